"""Mixtures of experts: training holds them fused, checkpoints have one tensor an expert, and so has the chain."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from tests.ranks import run_ranks_to_end, zero3_environment
from tests.trainer import experts_ranks
from weightline.chain.files.checkpoint import write_checkpoint
from weightline.chain.read.history import Chain, open_chain
from weightline.chain.replay.state import read_state
from weightline.chain.upkeep.verify import verify_chain
from weightline.chain.write.standalone import commit_folder
from weightline.codec.torch_ops import bits_of
from weightline.errors import InputError
from weightline.naming import checkpoint_tensors
from weightline.store.memory import MemoryStore
from weightline.trainer.partition import partition_of
from weightline.trainer.session import PublishSession
from weightline.trainer.settings import PublishSettings

_SIZES = {
    "vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "head_dim": 8, "num_experts_per_tok": 2, "dtype": "bfloat16",
}  # fmt: skip


def build_mixture(kind: str) -> PreTrainedModel:
    """A tiny mixture of five experts with random bf16 weights."""
    torch.manual_seed(0)
    if kind == "mixtral":
        model = MixtralForCausalLM(MixtralConfig(num_local_experts=5, intermediate_size=24, **_SIZES))
    else:
        model = Qwen3MoeForCausalLM(
            Qwen3MoeConfig(num_experts=5, intermediate_size=24, moe_intermediate_size=24, **_SIZES)
        )
    return model.to(torch.bfloat16)


def _train(chain: Chain, model: PreTrainedModel, num_steps: int) -> None:
    session = PublishSession(chain, PublishSettings())
    session.start(model, None, 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for number in range(1, num_steps + 1):
        tokens = torch.randint(0, 64, (2, 8), generator=torch.Generator().manual_seed(number))
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        session.sync(number)
    session.flush()
    session.close()


def assert_version_is_file(chain: Chain, version: int, path: Path) -> None:
    """Tensor by tensor: names, shapes and bits."""
    saved, specs = load_file(path), chain.manifest(version).specs
    assert {n: s.shape for n, s in specs.items()} == {n: tuple(t.shape) for n, t in saved.items()}
    bits = {name: bits.tobytes() for name, bits in read_state(chain, version).bits.items()}
    assert bits == {name: bits_of(tensor.reshape(-1)).tobytes() for name, tensor in saved.items()}


@pytest.mark.parametrize("kind", ["mixtral", "qwen3-moe"])
def test_the_tip_is_what_save_pretrained_wrote(kind: str, tmp_path: Path) -> None:
    chain, model = Chain(MemoryStore()), build_mixture(kind)
    assert any("experts.gate_up_proj" in name for name, _ in model.named_parameters())
    _train(chain, model, 2)
    model.save_pretrained(tmp_path / "saved")
    assert_version_is_file(chain, 2, tmp_path / "saved" / "model.safetensors")
    assert chain.tip().num_changed > 0
    assert verify_chain(chain).holds
    # The same names as those of a checkpoint folder, so both kinds of writers can take turns.
    assert commit_folder(chain, tmp_path / "saved").num_changed == 0


@pytest.mark.parametrize("kind", ["mixtral", "qwen3-moe"])
def test_a_pulled_folder_loads_to_the_same_fused_bits(kind: str, tmp_path: Path) -> None:
    chain, model = Chain(MemoryStore()), build_mixture(kind)
    _train(chain, model, 2)
    write_checkpoint(chain, 2, tmp_path / "pulled")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "pulled", dtype=torch.bfloat16)
    expected, found = dict(model.named_parameters()), dict(loaded.named_parameters())
    assert set(found) == set(expected)
    for name, tensor in found.items():
        assert bits_of(tensor).tobytes() == bits_of(expected[name]).tobytes(), name
    # A process that goes on from there is at the tip: a loaded model publishes the same names.
    session = PublishSession(chain, PublishSettings())
    assert session.start(loaded, None, 0).action == "continue"
    session.close()


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_ranks_parts_of_fused_experts_cover_each_tensor_once(world_size: int) -> None:
    model = build_mixture("qwen3-moe")
    covered: dict[str, list[tuple[int, int]]] = {}
    for rank in range(world_size):
        for shard in partition_of(model, rank, world_size):
            assert shard.read().numel() == shard.segment.length
            covered.setdefault(shard.segment.tensor.name, []).append((shard.segment.start, shard.segment.stop))
    for published in checkpoint_tensors(model):
        ranges = sorted(covered[published.spec.name])
        assert [start for start, _ in ranges] == [0, *[stop for _, stop in ranges[:-1]]]
        assert ranges[-1][1] == published.spec.num_elements


def test_a_checkpoint_that_is_rearranged_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.core_model_loading import Transpose, WeightConverter

    model = build_mixture("qwen3-moe")
    turned = WeightConverter("mlp.gate.weight", "mlp.gate.weight", operations=[Transpose(0, 1)])
    monkeypatch.setattr(model, "_weight_conversions", [turned], raising=False)
    with pytest.raises(InputError, match=r"computes .*mlp\.gate\.weight"):
        checkpoint_tensors(model)


@pytest.mark.train
def test_zero3_ranks_publish_their_parts_of_the_experts(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/bucket/chain"
    build_mixture("qwen3-moe").save_pretrained(tmp_path / "model")
    run_ranks_to_end(experts_ranks.main, (url, tmp_path), tmp_path / "ranks.log", zero3_environment())
    chain = open_chain(url)
    assert [m.world_size for m in chain.manifests()] == [2, 2, 2]
    assert_version_is_file(chain, 0, tmp_path / "model" / "model.safetensors")
    assert_version_is_file(chain, 2, tmp_path / "end" / "model.safetensors")
    assert chain.tip().num_changed > 0
    assert verify_chain(chain).holds
