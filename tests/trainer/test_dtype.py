"""The dtype of published weights: float32 masters of mixed precision are published rounded, and nothing else is."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, LlamaConfig, LlamaForCausalLM

from tests.ranks import RankGroup
from tests.trainer import dtype_ranks
from weightline.chain.files.checkpoint import write_checkpoint
from weightline.chain.read.history import Chain, open_chain
from weightline.chain.replay.state import read_state
from weightline.chain.upkeep.verify import verify_chain
from weightline.codec.torch_ops import bits_of
from weightline.errors import BaseMismatchError, InputError
from weightline.stages.model import build_byte_tokenizer, build_tiny_model
from weightline.stages.recipe import TinyModelConfig
from weightline.store.memory import MemoryStore
from weightline.trainer.published_dtype import decide_rule, explain_large_change
from weightline.trainer.session import PublishSession
from weightline.trainer.settings import PublishSettings
from weightline.types import TensorSpec

# peft 0.21 asks transformers by a name that it deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

_TINY = TinyModelConfig(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, head_dim=16,
    num_key_value_heads=1, initializer_range=0.1,
)  # fmt: skip
_SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
_EXPERTS = _SIZES | {
    "num_key_value_heads": 4, "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 8,
    "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8,
}  # fmt: skip
_BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"


def _bits(tensors: dict[str, torch.Tensor]) -> dict[str, bytes]:
    return {name: bits_of(tensor.contiguous().reshape(-1)).tobytes() for name, tensor in tensors.items()}


def _state_bits(chain: Chain, version: int) -> dict[str, bytes]:
    return {name: bits.tobytes() for name, bits in read_state(chain, version).bits.items()}


def _llama(**options: Any) -> LlamaForCausalLM:
    """A model that is held in float32."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**_SIZES | options)).float()


def _session(chain: Chain, model: Any, mixed_precision: str | None = "bf16", **settings: Any) -> PublishSession:
    session = PublishSession(chain, PublishSettings(**settings))
    session.start(model, mixed_precision=mixed_precision)
    return session


def _dtypes(chain: Chain) -> dict[str, str]:
    return {name: spec.dtype for name, spec in chain.tip().specs.items()}


def _train_with_trl(url: str, folder: Path, num_ranks: int, options: dict[str, Any] | None = None) -> str:
    """Returns what the ranks wrote."""
    ranks = RankGroup(dtype_ranks.main, (url, folder, options), folder / "ranks.log", num_ranks=num_ranks)
    assert ranks.wait() == [0] * num_ranks, ranks.log_tail
    return ranks.log_path.read_text()


@pytest.mark.train
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_trl_with_its_defaults_publishes_few_changes_and_the_cast_of_what_it_saves(
    num_ranks: int, tmp_path: Path
) -> None:
    build_tiny_model(_TINY, seed=0).save_pretrained(tmp_path / "model")
    build_byte_tokenizer(128).save_pretrained(tmp_path / "model")
    url = f"file://{tmp_path}/bucket/chain"
    log = _train_with_trl(url, tmp_path, num_ranks)
    chain = open_chain(url)
    manifests = chain.manifests()
    assert [(m.kind, m.world_size) for m in manifests] == [("anchor", num_ranks), *[("delta", num_ranks)] * 4]
    assert all(0 < m.num_changed < 0.05 * m.num_elements for m in manifests[1:])
    assert verify_chain(chain).holds
    saved = load_file(tmp_path / "end" / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    assert _state_bits(chain, 4) == _bits({name: tensor.bfloat16() for name, tensor in saved.items()})
    # The start model was bf16 on disk: the first version has its very bits.
    assert _state_bits(chain, 0) == _bits(load_file(tmp_path / "model" / "model.safetensors"))
    said = "weights held in float32 are published in bfloat16, the dtype of the model's config"
    assert log.count(said) == 1
    assert "elements changed in one sync" not in log
    write_checkpoint(chain, 4, tmp_path / "pulled")
    assert json.loads((tmp_path / "pulled" / "config.json").read_text())["dtype"] == "bfloat16"
    # A checkpoint holds the float32 masters: training resumes from it, at the version of their rounded bits.
    _train_with_trl(url, tmp_path, num_ranks, {"resumes_from": str(tmp_path / "out" / "checkpoint-2")})
    resumed = open_chain(url).manifests(5)
    assert [(m.kind, m.reverts_to) for m in resumed] == [("revert", 2), ("delta", None), ("delta", None)]
    assert resumed[-1].digests == manifests[4].digests


@pytest.mark.parametrize("setting", ["held", "float32"])
def test_held_publishes_float32_and_says_once_that_everything_changes(
    setting: str, caplog: pytest.LogCaptureFixture
) -> None:
    chain, model = Chain(MemoryStore()), _llama(dtype="bfloat16")
    session = _session(chain, model, dtype=setting)
    assert session.cast_note is None
    for step in (1, 2, 3):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.001)
        session.sync(step)
    session.flush()
    session.close()
    assert set(_dtypes(chain).values()) == {"F32"}
    assert _state_bits(chain, 3) == _bits({n: p.detach() for n, p in model.named_parameters()})
    warnings = [record.message for record in caplog.records if "changed in one sync: nearly every" in record.message]
    assert len(warnings) == 1
    assert "dtype='bfloat16'" in warnings[0]


def _nested(code: Any) -> Any:
    return SimpleNamespace(config=SimpleNamespace(dtype=None, text_config={"dtype": code}))


@pytest.mark.parametrize(
    ("mixed_precision", "config", "wanted"),
    [
        ("bf16", {"dtype": "bfloat16"}, "BF16"),
        ("bf16", {"dtype": "float16"}, "F16"),
        ("fp16", {"dtype": "bfloat16"}, "BF16"),
        ("fp16", {}, "F16"),
        ("bf16", {"dtype": "float32"}, "BF16"),
        ("no", {"dtype": "bfloat16"}, None),
        (None, {"dtype": "bfloat16"}, None),
    ],
)
def test_auto_takes_the_dtype_that_the_model_is_served_in(
    mixed_precision: str | None, config: dict[str, Any], wanted: str | None
) -> None:
    assert decide_rule("auto", _llama(**config), mixed_precision, Chain(MemoryStore())).target == wanted


@pytest.mark.parametrize("code", ["bfloat16", "torch.bfloat16", torch.bfloat16, {"": "bfloat16"}])
def test_the_config_of_the_text_model_counts_where_the_models_own_names_no_dtype(code: Any) -> None:
    assert decide_rule("auto", _nested(code), "fp16", Chain(MemoryStore())).target == "BF16"


def test_a_checkpoint_that_was_loaded_in_float32_is_asked_for_its_dtype(tmp_path: Path) -> None:
    _llama().half().save_pretrained(tmp_path)
    model = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert model.config.dtype == torch.float32
    rule = decide_rule("auto", model, "bf16", Chain(MemoryStore()))
    assert (rule.target, rule.base) == ("F16", "F16")


def test_a_checkpoint_that_names_float32_is_published_in_the_dtype_that_training_computes_in(tmp_path: Path) -> None:
    _llama().save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float32"
    model = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    rule = decide_rule("auto", model, "bf16", Chain(MemoryStore()))
    assert (rule.target, rule.reason, rule.base) == ("BF16", "in which training computes", None)


def test_auto_goes_on_in_the_dtype_that_the_chain_has() -> None:
    chain, model = Chain(MemoryStore()), _llama(dtype="bfloat16")
    _session(chain, model, dtype="held").close()
    session = _session(chain, model)
    session.close()
    assert session.cast_note is None
    assert chain.tip_version() == 0
    with pytest.raises(BaseMismatchError, match="dtype='float32'"):
        _session(chain, model, dtype="bfloat16")


def test_weights_that_were_rounded_are_the_tip_when_they_are_loaded_again(tmp_path: Path) -> None:
    chain, model = Chain(MemoryStore()), _llama(dtype="bfloat16", tie_word_embeddings=True)
    session = _session(chain, model)
    with torch.no_grad():
        model.model.embed_tokens.weight[3] += 0.5
    session.sync(1)
    session.flush()
    session.close()
    assert 0 < chain.tip().num_changed <= 32
    write_checkpoint(chain, 1, tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    assert loaded.dtype == torch.bfloat16
    for start in (loaded, loaded.float(), model):
        session = PublishSession(chain, PublishSettings())
        assert session.start(start, mixed_precision="bf16").action == "continue"
        session.close()


def _deepseek() -> DeepseekV3ForCausalLM:
    torch.manual_seed(0)
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**_EXPERTS, dtype="bfloat16"))
    model.get_buffer(_BIAS).copy_(6.8 + 0.25 * torch.rand(8))
    return model.float()


@pytest.mark.parametrize("setting", ["auto", "held", "bfloat16", "float16", "float32"])
def test_what_the_architecture_keeps_in_float32_stays_float32(setting: str) -> None:
    chain, model = Chain(MemoryStore()), _deepseek()
    _session(chain, model, dtype=setting).close()
    dtypes = _dtypes(chain)
    wanted = {"auto": "BF16", "bfloat16": "BF16", "float16": "F16"}.get(setting, "F32")
    assert dtypes[_BIAS] == "F32"
    # transformers 5.23 keeps the bias only.
    is_kept = any("gate.weight" in name for name in model._keep_in_fp32_modules_strict or ())
    assert dtypes["model.layers.1.mlp.gate.weight"] == ("F32" if is_kept else wanted)
    assert dtypes["model.layers.1.mlp.experts.3.down_proj.weight"] == dtypes["lm_head.weight"] == wanted
    assert _state_bits(chain, 0)[_BIAS] == _bits({_BIAS: model.get_buffer(_BIAS)})[_BIAS]


def test_an_adapter_is_published_in_the_dtype_of_its_base_whose_digest_is_that_of_its_checkpoint(
    tmp_path: Path,
) -> None:
    """peft holds adapters in float32 also on a 16-bit base."""
    _llama().bfloat16().save_pretrained(tmp_path / "base")
    lora = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    bases = set()
    for loaded in (torch.bfloat16, torch.float32):
        base = LlamaForCausalLM.from_pretrained(tmp_path / "base", dtype=loaded)
        torch.manual_seed(0)
        chain, model = Chain(MemoryStore()), get_peft_model(base, lora)
        _session(chain, model).close()
        model.save_pretrained(tmp_path / "saved")
        saved = load_file(tmp_path / "saved" / "adapter_model.safetensors")
        assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
        assert _state_bits(chain, 0) == _bits({name: tensor.bfloat16() for name, tensor in saved.items()})
        base_model = chain.tip().base_model
        assert base_model is not None
        bases.add(base_model.digest)
    assert len(bases) == 1
    # A base that is no longer the rounded one is another base.
    base.model.norm.weight.data[0] += 2**-12
    chain = Chain(MemoryStore())
    _session(chain, model).close()
    other = chain.tip().base_model
    assert other is not None
    assert other.digest not in bases


class _Router(torch.nn.Module):
    """A router's biases as architectures hold them that do not say what stays float32."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.rand(4, 4))
        self.e_score_correction_bias = torch.nn.Parameter(torch.rand(4), requires_grad=False)
        self.expert_bias = torch.nn.Parameter(torch.rand(4), requires_grad=False)
        self.register_buffer("running_mean", torch.rand(4))
        self.register_buffer("count", torch.zeros(1, dtype=torch.int64))


def test_router_biases_and_buffers_are_never_cast() -> None:
    chain = Chain(MemoryStore())
    _session(chain, _Router(), None, dtype="bfloat16").close()
    wanted = {"weight": "BF16", "count": "I64"}
    names = ("weight", "e_score_correction_bias", "expert_bias", "running_mean", "count")
    assert _dtypes(chain) == {name: wanted.get(name, "F32") for name in names}


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(InputError, match="dtype is 'fp8': name one of auto, held, bfloat16, float16, float32"):
        PublishSettings(dtype="fp8")  # type: ignore[arg-type]


def test_a_high_learning_rate_is_named_as_the_reason_of_large_changes_of_16_bit_weights() -> None:
    weights = TensorSpec("w", "BF16", (10, 10))
    norms = TensorSpec("n", "F32", (10,))
    assert explain_large_change({weights: 50, norms: 5}) is None
    reason = explain_large_change({weights: 51, norms: 10})
    assert reason is not None
    assert "learning rate" in reason
