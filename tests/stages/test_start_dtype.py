"""The start model of a recipe keeps the dtypes that it has; a cast is asked for, and logged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    LagunaConfig,
    LagunaForCausalLM,
    MiniMaxM2Config,
    MiniMaxM2ForCausalLM,
    PreTrainedModel,
)

from tests.ranks import run_stage
from weightline.chain import open_chain
from weightline.chain.replay.state import read_state
from weightline.codec.torch_ops import bits_of
from weightline.dtypes import DtypeSetting
from weightline.stages.job import StageJob
from weightline.stages.model import VOCAB_SIZE, build_byte_tokenizer, build_tiny_model, materialize_model
from weightline.stages.recipe import DatasetConfig, ModelConfig, StageConfig, TinyModelConfig
from weightline.stages.start_dtype import held_dtype, restore_float32, training_dtype

_TINY = TinyModelConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1, head_dim=16,
                        num_key_value_heads=1)  # fmt: skip
_SIZES = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "num_experts_per_tok": 2, "pad_token_id": 257,
    "eos_token_id": 256, "bos_token_id": None, "dtype": "bfloat16",
}  # fmt: skip


def _deepseek() -> PreTrainedModel:
    """Names its router's bias, a buffer, as one that stays float32."""
    config = DeepseekV3Config(
        **_SIZES, n_routed_experts=8, moe_intermediate_size=16, n_group=2, topk_group=1, first_k_dense_replace=1,
        q_lora_rank=16, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8,
    )  # fmt: skip
    return DeepseekV3ForCausalLM(config)


def _minimax() -> PreTrainedModel:
    """Does not name its router's bias, a buffer."""
    return MiniMaxM2ForCausalLM(MiniMaxM2Config(**_SIZES, num_local_experts=8, head_dim=8))


def _laguna() -> PreTrainedModel:
    """Does not name its router's bias, a frozen parameter."""
    return LagunaForCausalLM(LagunaConfig(**_SIZES, num_experts=8, moe_intermediate_size=16, head_dim=8))


def _published(model: PreTrainedModel, folder: Path) -> dict[str, torch.Tensor]:
    """Saves it as mixtures are published: bf16, with router biases in float32, in a narrow band far from zero."""
    torch.manual_seed(0)
    model.to(torch.bfloat16).save_pretrained(folder)
    build_byte_tokenizer(128).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    biases = {name: 6.8 + 0.25 * torch.rand(t.shape) for name, t in tensors.items() if name.endswith("correction_bias")}
    assert biases
    save_file(tensors | biases, folder / "model.safetensors", metadata={"format": "pt"})
    return biases


def _bits(tensors: dict[str, torch.Tensor]) -> dict[str, bytes]:
    return {name: bits_of(tensor.contiguous().reshape(-1)).tobytes() for name, tensor in tensors.items()}


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("dtype", ["auto", "held", "bfloat16", "float16", "float32"])
def test_router_biases_stay_as_they_are(dtype: DtypeSetting, tmp_path: Path) -> None:
    biases = _published(_deepseek(), tmp_path / "hub")
    held = _weights(tmp_path / "hub")
    taken = _weights(materialize_model(ModelConfig(path=str(tmp_path / "hub")), tmp_path / "start", 0, dtype))
    assert _bits({name: taken[name] for name in biases}) == _bits(biases)
    wanted = {"float16": torch.float16, "float32": torch.float32}.get(dtype, torch.bfloat16)
    kept = {name for name in held if name in biases or name.endswith("mlp.gate.weight")}
    assert len(kept) == 2
    assert _bits({n: t for n, t in taken.items() if n not in kept}) == _bits(
        {name: tensor.to(wanted) for name, tensor in held.items() if name not in kept}
    )


@pytest.mark.parametrize("held", [torch.float32, torch.float16])
def test_a_model_that_is_not_bf16_is_kept_and_trained_in_float32(held: torch.dtype, tmp_path: Path) -> None:
    build_tiny_model(_TINY, seed=3).to(held).save_pretrained(tmp_path / "hub")
    build_byte_tokenizer(64).save_pretrained(tmp_path / "hub")
    config = ModelConfig(path=str(tmp_path / "hub"))
    taken = materialize_model(config, tmp_path / "start", seed=0)
    assert _bits(_weights(taken)) == _bits(_weights(tmp_path / "hub"))
    assert AutoModelForCausalLM.from_pretrained(taken).dtype == held
    assert training_dtype("auto", taken) == training_dtype("held", taken) == torch.float32
    assert training_dtype("bfloat16", taken) == torch.bfloat16


def test_a_cast_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    build_tiny_model(_TINY, seed=3).float().save_pretrained(tmp_path / "hub")
    build_byte_tokenizer(64).save_pretrained(tmp_path / "hub")
    config, num_tensors = ModelConfig(path=str(tmp_path / "hub")), len(_weights(tmp_path / "hub"))
    materialize_model(config, tmp_path / "kept", seed=0)
    assert "cast" not in caplog.text
    taken = materialize_model(config, tmp_path / "cast", 0, "bfloat16")
    assert f"{num_tensors} tensors of the start model are cast: the recipe says `dtype: bfloat16`" in caplog.text
    assert held_dtype(taken) == "BF16"
    assert AutoModelForCausalLM.from_pretrained(taken).dtype == torch.bfloat16


@pytest.mark.parametrize("build", [_deepseek, _minimax, _laguna])
def test_router_biases_survive_loading_in_bf16_and_saving(build: Any, tmp_path: Path) -> None:
    biases = _published(build(), tmp_path / "hub")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hub", dtype=torch.bfloat16)
    found = restore_float32(model, tmp_path / "hub")
    assert found.rounded == ()
    assert set(found.restored) == (set() if build is _deepseek else set(biases))
    assert restore_float32(model, tmp_path / "hub").restored == ()
    model.save_pretrained(tmp_path / "saved")
    saved = _weights(tmp_path / "saved")
    assert _bits({name: saved[name] for name in biases}) == _bits(biases)
    model(input_ids=torch.arange(8).reshape(1, 8), labels=torch.arange(8).reshape(1, 8)).loss.backward()


def test_float32_weights_that_are_trained_in_bf16_are_named(tmp_path: Path) -> None:
    build_tiny_model(_TINY, seed=3).save_pretrained(tmp_path)
    tensors = _weights(tmp_path)
    save_file(
        tensors | {"model.norm.weight": tensors["model.norm.weight"].float()}, tmp_path / "model.safetensors",
        metadata={"format": "pt"},
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert restore_float32(model, tmp_path).rounded == ("model.norm.weight",)


def _stage(folder: Path, dtype: DtypeSetting) -> StageJob:
    stage = StageConfig(
        kind="sft", max_steps=2, learning_rate=1e-3, per_device_batch_size=2, sync_steps=1, save_steps=2,
        dataset=DatasetConfig(num_examples=20),
    )  # fmt: skip
    return StageJob(
        stage=stage, model_dir=folder / "start", output_dir=folder / "sft", run_id="run-1", dtype=dtype,
        chain_url=f"file://{folder}/bucket/chain",
    )  # fmt: skip


def _assert_tip_is_saved(job: StageJob) -> None:
    assert job.chain_url is not None
    chain = open_chain(job.chain_url)
    tip = {name: bits.tobytes() for name, bits in read_state(chain, chain.tip().version).bits.items()}
    assert tip == _bits(_weights(job.final_model_dir))


@pytest.mark.train
@pytest.mark.parametrize("build", [_deepseek, _minimax, _laguna])
def test_router_biases_survive_a_stage_under_zero3(build: Any, tmp_path: Path) -> None:
    biases = _published(build(), tmp_path / "start")
    job = _stage(tmp_path, "auto")
    run_stage(job, tmp_path / "ranks.log")
    saved = _weights(job.final_model_dir)
    assert _bits({name: saved[name] for name in biases}) == _bits(biases)
    _assert_tip_is_saved(job)
    assert job.chain_url is not None
    first = read_state(open_chain(job.chain_url), 0)
    assert {name: bits.tobytes() for name, bits in first.bits.items()} == _bits(_weights(tmp_path / "start"))


@pytest.mark.train
def test_a_float32_model_goes_through_a_stage_unrounded(tmp_path: Path) -> None:
    build_tiny_model(_TINY, seed=3).float().save_pretrained(tmp_path / "start")
    tensors = _weights(tmp_path / "start")
    save_file(
        {name: tensor + 1e-5 * torch.rand(tensor.shape) for name, tensor in tensors.items()},
        tmp_path / "start" / "model.safetensors", metadata={"format": "pt"},
    )  # fmt: skip
    build_byte_tokenizer(128).save_pretrained(tmp_path / "start")
    job = _stage(tmp_path, "auto")
    run_stage(job, tmp_path / "ranks.log")
    assert job.chain_url is not None
    first = read_state(open_chain(job.chain_url), 0)
    assert {name: bits.tobytes() for name, bits in first.bits.items()} == _bits(_weights(tmp_path / "start"))
    _assert_tip_is_saved(job)
    log = (tmp_path / "ranks.log").read_text()
    assert log.count("training computes in float32") == 1
