"""Mixtures of experts: the chain has one tensor an expert and projection, the running model has them fused."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.serving.model_chains import assert_same_bits, make_chain
from weightline.chain import Chain
from weightline.chain.files.checkpoint import write_checkpoint
from weightline.codec.torch_ops import bits_of
from weightline.serving.engines.base import GenerationRequest
from weightline.serving.engines.transformers import TransformersEngine
from weightline.serving.replica.replica import Replica


def _fused_bits(model: torch.nn.Module) -> dict[str, Any]:
    """By the names in memory: nothing of our own mapping takes part."""
    return {name: bits_of(tensor).reshape(-1).copy() for name, tensor in model.state_dict().items()}


def _fresh(chain: Chain, version: int, folder: Path) -> dict[str, Any]:
    write_checkpoint(chain, version, folder)
    return _fused_bits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16))


@pytest.mark.parametrize("kind", ["mixtral", "qwen3-moe"])
def test_a_mixture_follows_its_chain_to_the_fused_bits(kind: str, tmp_path: Path) -> None:
    grown = make_chain(f"memory://{uuid.uuid4().hex}/mixture", kind, num_versions=4)
    assert any(".experts.2." in name for name in grown.chain.manifest(0).tensors)
    engine = TransformersEngine("cpu")
    replica = Replica(grown.chain, engine, tmp_path / "state", "replica-0")
    replica.refresh(0)
    held = dict(engine._model.named_parameters())
    assert any(name.endswith("experts.gate_up_proj") for name in held)
    storage = {name: tensor.data_ptr() for name, tensor in held.items()}
    for version in (1, 3, 1):
        facts = replica.refresh(version, allow_backward=True)
        assert facts.num_changed > 0
        assert_same_bits(_fused_bits(engine._model), _fresh(grown.chain, version, tmp_path / uuid.uuid4().hex))
        assert engine.generate(GenerationRequest(("12+34=",), max_tokens=4)).version == version
    assert {name: tensor.data_ptr() for name, tensor in engine._model.named_parameters()} == storage
