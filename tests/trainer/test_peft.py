"""LoRA adapters: a chain of their own that holds what peft would save, tied to the base model by its bits."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AdaptionPromptConfig,
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    PeftConfig,
    PeftModel,
    VeraConfig,
    get_peft_model,
    inject_adapter_in_model,
)
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from tests.ranks import run_stage
from tests.trainer import peft_ranks
from weightline.chain.files.checkpoint import write_checkpoint
from weightline.chain.read.history import Chain, open_chain
from weightline.chain.replay.state import read_state
from weightline.chain.upkeep.verify import verify_chain
from weightline.chain.write.standalone import commit_folder, commit_fork, commit_revert
from weightline.codec.torch_ops import bits_of
from weightline.errors import BaseMismatchError, InputError
from weightline.format.manifest import Manifest
from weightline.stages.job import StageJob
from weightline.stages.model import materialize_model
from weightline.stages.recipe import DatasetConfig, ModelConfig, StageConfig, TinyModelConfig
from weightline.store.memory import MemoryStore
from weightline.trainer.adapter import adapter_names, adapter_parts
from weightline.trainer.session import PublishSession
from weightline.trainer.settings import PublishSettings

# peft 0.21 asks transformers by a name that it deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

_LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
_OPTIONS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"use_dora": True},
    "bias": {"bias": "lora_only"},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "trainable_tokens": {"trainable_token_indices": [1, 5]},
    "embeddings": {"target_modules": ["embed_tokens", "o_proj"]},
}


def _base(seed: int = 0, *, tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        attention_bias=True, tie_word_embeddings=tied, dtype="bfloat16",
    )  # fmt: skip
    return LlamaForCausalLM(config).to(torch.bfloat16)


def _adapted(base: LlamaForCausalLM, **options: Any) -> PeftModel:
    torch.manual_seed(1)
    return get_peft_model(base, LoraConfig(**_LORA | options))


def _optimizer_steps(model: PeftModel, num_steps: int) -> Iterator[int]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for number in range(1, num_steps + 1):
        tokens = torch.randint(0, 64, (2, 8), generator=torch.Generator().manual_seed(number))
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield number


def _start(chain: Chain, model: Any) -> PublishSession:
    session = PublishSession(chain, PublishSettings(stage="sft"))
    session.start(model, None, 0)
    return session


def _train(chain: Chain, model: PeftModel, num_steps: int = 2) -> None:
    session = _start(chain, model)
    for number in _optimizer_steps(model, num_steps):
        session.sync(number)
    session.flush()
    session.close()


def _bits(path: Path) -> dict[str, bytes]:
    return {name: bits_of(tensor.reshape(-1)).tobytes() for name, tensor in load_file(path).items()}


def _state_bits(chain: Chain, version: int) -> dict[str, bytes]:
    return {name: bits.tobytes() for name, bits in read_state(chain, version).bits.items()}


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
@pytest.mark.parametrize("options", _OPTIONS.values(), ids=_OPTIONS)
def test_versions_are_what_peft_saves(options: dict[str, Any], tmp_path: Path) -> None:
    chain, model = Chain(MemoryStore()), _adapted(_base(), **options)
    session = _start(chain, model)
    model.save_pretrained(tmp_path / "0")
    for number in _optimizer_steps(model, 3):
        session.sync(number)
        model.save_pretrained(tmp_path / str(number))
    session.flush()
    session.close()
    for version in range(4):
        saved = tmp_path / str(version) / "adapter_model.safetensors"
        assert _state_bits(chain, version) == _bits(saved)
        assert {n: s.shape for n, s in chain.manifest(version).specs.items()} == {
            name: tuple(tensor.shape) for name, tensor in load_file(saved).items()
        }
    assert _state_bits(chain, 0) != _state_bits(chain, 3)
    assert verify_chain(chain).holds


def test_pull_gives_a_folder_that_peft_loads(tmp_path: Path) -> None:
    chain, model = Chain(MemoryStore()), _adapted(_base())
    _train(chain, model)
    model.save_pretrained(tmp_path / "saved")
    out = tmp_path / "pulled"
    write_checkpoint(chain, 2, out)
    assert sorted(path.name for path in out.iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "weightline.json",
    ]  # fmt: skip
    config = "adapter_config.json"
    assert json.loads((out / config).read_text()) == json.loads((tmp_path / "saved" / config).read_text())
    loaded = PeftModel.from_pretrained(_base(), out)
    tokens = torch.arange(16).reshape(2, 8)
    with torch.no_grad():
        expected, found = model.eval()(input_ids=tokens).logits, loaded.eval()(input_ids=tokens).logits
        plain = _base()(input_ids=tokens).logits
    assert bits_of(found).tobytes() == bits_of(expected).tobytes()
    assert bits_of(found).tobytes() != bits_of(plain).tobytes()


def test_every_manifest_names_the_base() -> None:
    chain, base = Chain(MemoryStore()), _base()
    _train(chain, _adapted(base))
    commit_revert(chain, 1)
    fork = Chain(MemoryStore("memory://fork"))
    commit_fork(chain, 1, fork)
    first = chain.manifest(0).base_model
    assert first is not None
    assert first.num_elements == sum(parameter.numel() for parameter in _base().parameters())
    assert [m.base_model for m in (*chain.manifests(), fork.tip())] == [first] * 5
    assert Manifest.from_bytes(chain.tip().to_bytes()).base_model == first


def test_the_base_has_one_digest_whatever_sits_on_it() -> None:
    digests = set()
    for name, options in _OPTIONS.items():
        if name != "bias":  # which trains the base's own biases
            chain = Chain(MemoryStore())
            _start(chain, _adapted(_base(), **options)).close()
            base_model = chain.tip().base_model
            assert base_model is not None
            digests.add(base_model.digest)
    assert len(digests) == 1


_TUNERS: dict[str, PeftConfig] = {
    "lora": LoraConfig(**_LORA, modules_to_save=["lm_head"], trainable_token_indices=[1]),
    "ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "vera": VeraConfig(target_modules=["q_proj"]),
    "layer norms": LNTuningConfig(target_modules=["norm"]),
    "adaption prompt": AdaptionPromptConfig(adapter_len=4, adapter_layers=1, task_type="CAUSAL_LM"),
}


@pytest.mark.filterwarnings(
    "ignore:Setting `save_embedding_layers`:UserWarning", "ignore:Unsupported layer:UserWarning"
)
@pytest.mark.parametrize("config", _TUNERS.values(), ids=_TUNERS)
def test_the_base_has_one_digest_whatever_the_adapter_is_called(config: PeftConfig) -> None:
    """peft puts an adapter's name into the names of its tensors, where a module may be called the same."""
    wanted = {name: parameter.shape for name, parameter in _base().named_parameters()}
    for name in ("default", "mlp", "model", "q_proj", "norm", "0"):
        model = get_peft_model(_base(), config, adapter_name=name)
        parts = adapter_parts(model, adapter_names(model))
        assert {tensor.spec.name: tensor.spec.shape for tensor in parts.base} == wanted, name


def test_another_base_is_refused_before_training() -> None:
    chain = Chain(MemoryStore())
    _train(chain, _adapted(_base()))
    tip = read_state(chain, 2)
    other = _base()
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight.view(torch.int16)[3, 3] ^= 1
    with pytest.raises(BaseMismatchError, match="belongs to"):
        _start(chain, _with_adapter(other, tip.bits))
    with pytest.raises(BaseMismatchError, match="belongs to"):
        _start(chain, _with_adapter(_base().float(), tip.bits))
    assert chain.tip_version() == 2
    session = _start(chain, _with_adapter(_base(), tip.bits))
    session.close()
    assert chain.tip_version() == 2


def _with_adapter(base: LlamaForCausalLM, bits: dict[str, Any]) -> PeftModel:
    """The adapter of a version on a base, ready to train on."""
    model = _adapted(base)
    state = model.state_dict()
    for name, bits_N in bits.items():
        held = state[name.replace(".weight", ".default.weight")]
        held.view(-1).copy_(torch.from_numpy(bits_N).view(held.dtype))
    return model


def test_a_committed_adapter_folder_is_tied_to_its_base(tmp_path: Path) -> None:
    _base().save_pretrained(tmp_path / "base")
    model = _adapted(LlamaForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16))
    model.save_pretrained(tmp_path / "adapter")
    chain = Chain(MemoryStore())
    first = commit_folder(chain, tmp_path / "adapter")
    assert first.base_model is not None
    assert first.base_model.name_or_path == str(tmp_path / "base")
    # The trainer tells the same base by what it holds, and goes on.
    _train(chain, model)
    assert [m.base_model for m in chain.manifests()] == [first.base_model] * 3
    _base(seed=2).save_pretrained(tmp_path / "base")
    with pytest.raises(BaseMismatchError, match="belongs to"):
        commit_folder(chain, tmp_path / "adapter")
    write_checkpoint(chain, 0, tmp_path / "pulled")
    name = "adapter_model.safetensors"
    assert _bits(tmp_path / "pulled" / name) == _bits(tmp_path / "adapter" / name)


def test_a_full_model_does_not_go_on_an_adapters_chain() -> None:
    chain = Chain(MemoryStore())
    _train(chain, _adapted(_base()))
    with pytest.raises(BaseMismatchError, match="another model"):
        _start(chain, _base())


def test_what_peft_would_not_save_is_refused() -> None:
    model = _adapted(_base())
    model.base_model.model.model.norm.weight.requires_grad_(True)
    with pytest.raises(InputError, match=r"norm\.weight is trained"):
        _start(Chain(MemoryStore()), model)


def test_an_adapter_without_a_peft_model_is_refused() -> None:
    base = _base()
    # What transformers' add_adapter does, which asks for a peft that is not released yet.
    inject_adapter_in_model(LoraConfig(**_LORA), base)
    with pytest.raises(InputError, match="get_peft_model"):
        _start(Chain(MemoryStore()), base)


@pytest.mark.train
def test_two_zero3_ranks_publish_the_adapter_alone(tmp_path: Path) -> None:
    """A LoRA SFT of TRL's trainer; the base, partitioned like everything else, is told by its bits."""
    tiny = TinyModelConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, head_dim=8)
    model_dir = materialize_model(ModelConfig(tiny=tiny), tmp_path / "model", seed=0)
    stage = StageConfig(
        kind="sft", max_steps=4, learning_rate=1e-2, per_device_batch_size=4, sync_steps=2, save_steps=4,
        dataset=DatasetConfig(num_examples=100),
    )  # fmt: skip
    job = StageJob(
        stage=stage, model_dir=model_dir, output_dir=tmp_path / "sft", run_id="run-1",
        chain_url=f"file://{tmp_path}/bucket/chain",
    )  # fmt: skip
    run_stage(job, tmp_path / "ranks.log", peft_ranks.main)
    assert job.chain_url is not None
    chain = open_chain(job.chain_url)
    assert [m.global_step for m in chain.manifests()] == [0, 2, 4]
    assert all(m.world_size == 2 for m in chain.manifests())
    assert _state_bits(chain, 2) == _bits(job.final_model_dir / "adapter_model.safetensors")
    assert _state_bits(chain, 2) != _state_bits(chain, 0)
    assert verify_chain(chain).holds
    # One process that holds the whole base finds the same digest.
    alone = Chain(MemoryStore())
    _start(alone, _whole(model_dir)).close()
    there, here = chain.tip().base_model, alone.tip().base_model
    assert there is not None
    assert here is not None
    assert (there.digest, there.num_elements) == (here.digest, here.num_elements)


def _whole(model_dir: Path) -> PeftModel:
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16)
    return get_peft_model(base, LoraConfig(**_LORA))
