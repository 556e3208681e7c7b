"""Chains of real, tiny transformers models: what replicas and evaluations are tested on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, Qwen3Config, Qwen3MoeConfig

from tests.chains import commit_state
from weightline.chain import Chain, open_chain
from weightline.chain.files.checkpoint import write_checkpoint
from weightline.codec.torch_ops import bits_of
from weightline.format.manifest import AssetRef, Manifest
from weightline.naming import checkpoint_tensors
from weightline.serving.engines.transformers import TransformersEngine
from weightline.stages.model import VOCAB_SIZE, build_byte_tokenizer
from weightline.trainer.model_files import upload_assets

Bits = dict[str, npt.NDArray[np.uint16]]

_SIZES = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128,
    "bos_token_id": None, "eos_token_id": 256, "pad_token_id": 257, "initializer_range": 0.5, "dtype": "bfloat16",
}  # fmt: skip
CONFIGS: dict[str, Any] = {
    "qwen3": Qwen3Config(**_SIZES, tie_word_embeddings=False),
    "qwen3-tied": Qwen3Config(**_SIZES, tie_word_embeddings=True),
    "llama": LlamaConfig(**_SIZES, tie_word_embeddings=False),
    "mixtral": MixtralConfig(**_SIZES, num_local_experts=3, num_experts_per_tok=2),
    "qwen3-moe": Qwen3MoeConfig(**_SIZES, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=24),
}


def build_model(kind: str, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> torch.nn.Module:
    """Random weights of bf16's precision, large enough that greedy texts of two seeds differ."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: torch.nn.Module = AutoModelForCausalLM.from_config(CONFIGS[kind]).to(torch.bfloat16)
    return model.to(dtype)


def state_of(model: torch.nn.Module) -> Bits:
    """The parameters' bits, copied, as a trainer publishes them: a tied one once, fused experts one by one."""
    return {
        one.spec.name: bits_of(one.held)
        .reshape(-1)[one.offset :][: one.spec.num_elements]
        .reshape(one.spec.shape)
        .copy()
        for one in checkpoint_tensors(model)
    }


def trained(state: Mapping[str, npt.NDArray[Any]], seed: int, density: float = 0.02) -> Bits:
    """The state with a few elements replaced by other elements: sparse, and enough to change what the model says."""
    rng = np.random.default_rng(seed)
    moved = {}
    for name, bits in state.items():
        flat = bits.reshape(-1).copy()
        at = rng.choice(flat.size, max(1, int(flat.size * density)), replace=False)
        drawn = rng.normal(0, 0.5, at.size).astype(np.float32).view(np.uint32)
        flat[at] = drawn if flat.itemsize == 4 else drawn >> 16
        moved[name] = flat.reshape(bits.shape)
    return moved


@dataclass
class ModelChain:
    """A chain and, for every version of it, the bits that were committed."""

    chain: Chain
    kind: str
    assets: tuple[AssetRef, ...]
    dtype: torch.dtype = torch.bfloat16
    states: list[Bits] = field(default_factory=list)

    def grow(self, state: Bits | None = None, *, as_anchor: bool = False, **fields: Any) -> Manifest:
        """Commit the next version: the given state, or the last one trained on."""
        version = len(self.states)
        new = state or (trained(self.states[-1], version) if self.states else self._first())
        old = None if as_anchor or not self.states else self.states[-1]
        manifest = commit_state(self.chain, new, old, assets=() if self.states else self.assets, **fields)
        self.states.append(new)
        return manifest

    def _first(self) -> Bits:
        return state_of(build_model(self.kind, dtype=self.dtype))


def make_chain(
    url: str,
    kind: str = "qwen3",
    num_versions: int = 1,
    *,
    chat_template: str | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> ModelChain:
    chain = open_chain(url)
    tokenizer = build_byte_tokenizer(128)
    tokenizer.chat_template = chat_template
    assets = upload_assets(chain.store, build_model(kind), tokenizer)
    made = ModelChain(chain, kind, assets, dtype)
    for _ in range(num_versions):
        made.grow()
    return made


def engine_bits(engine: TransformersEngine) -> Bits:
    """Every tensor that the running model computes with."""
    return {name: engine.read_bits(name).copy() for name in engine.specs()}


def fresh_bits(chain: Chain, version: int, folder: Path) -> Bits:
    """Every tensor of the version as transformers loads it from a checkpoint folder."""
    write_checkpoint(chain, version, folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    return {name: bits_of(tensor).reshape(-1).copy() for name, tensor in model.state_dict().items()}


def assert_same_bits(actual: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    assert actual.keys() == expected.keys()
    for name, bits in expected.items():
        np.testing.assert_array_equal(actual[name], bits, err_msg=name, strict=True)
