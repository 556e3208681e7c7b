"""Checkpoint folders of large models with random weights, and the next ones after an optimizer step."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from weightline.chain.files.safetensors_file import write_safetensors
from weightline.chain.files.source import FolderSource, tiles_in
from weightline.types import BitsArray, TensorSpec

Shapes = Mapping[str, tuple[int, ...]]

#: About 2.4 % of Qwen3's bf16 elements change when an optimizer moves float32 weights so far.
_STEP_SIZE = np.float32(5.1e-7)

#: 2 GB of bf16.
LARGE: Shapes = {f"layers.{n}.weight": (62_500, 1000) for n in range(16)}


def _qwen3() -> Shapes:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (151_936, 1024), "model.norm.weight": (1024,)}
    for n in range(28):
        layer = f"model.layers.{n}"
        shapes |= {
            f"{layer}.self_attn.q_proj.weight": (2048, 1024), f"{layer}.self_attn.k_proj.weight": (1024, 1024),
            f"{layer}.self_attn.v_proj.weight": (1024, 1024), f"{layer}.self_attn.o_proj.weight": (1024, 2048),
            f"{layer}.mlp.gate_proj.weight": (3072, 1024), f"{layer}.mlp.up_proj.weight": (3072, 1024),
            f"{layer}.mlp.down_proj.weight": (1024, 3072), f"{layer}.input_layernorm.weight": (1024,),
            f"{layer}.post_attention_layernorm.weight": (1024,), f"{layer}.self_attn.q_norm.weight": (128,),
            f"{layer}.self_attn.k_norm.weight": (128,),
        }  # fmt: skip
    return shapes


#: The shape of Qwen3-0.6B: 596M elements, 156M of them in one tensor.
QWEN3: Shapes = _qwen3()


def small_shapes(shapes: Shapes) -> Shapes:
    """Returns the shapes with a hundredth of the elements."""
    return {name: tuple(max(1, size // 10) for size in shape) for name, shape in shapes.items()}


def save_model(folder: Path, shapes: Shapes) -> None:
    """Writes a checkpoint folder of normal random weights, a tensor at a time."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    specs = [TensorSpec(name, "BF16", shape) for name, shape in shapes.items()]
    (folder / "config.json").write_text(json.dumps({"model_type": "bench"}))

    def bits(spec: TensorSpec) -> BitsArray:
        return _bf16(rng.standard_normal(spec.num_elements, np.float32) * np.float32(0.02))

    write_safetensors(
        folder / "model.safetensors", specs, lambda ordered: (t for spec in ordered for t in tiles_in(spec, bits(spec)))
    )


def save_step(before: Path, after: Path) -> None:
    """Writes the folder after an optimizer step. The float32 weights have random bits below those of bf16."""
    after.mkdir()
    source, rng = FolderSource(before), np.random.default_rng(1)
    (after / "config.json").write_bytes((before / "config.json").read_bytes())

    def bits(spec: TensorSpec) -> BitsArray:
        old_N = source.read([spec.name])[spec.name]
        held_N = (old_N.astype(np.uint32) << 16 | rng.integers(0, 1 << 16, old_N.size, np.uint32)).view(np.float32)
        return _bf16(held_N + np.where(rng.random(old_N.size, np.float32) < 0.5, _STEP_SIZE, -_STEP_SIZE))

    write_safetensors(
        after / "model.safetensors",
        list(source.specs.values()),
        lambda ordered: (t for spec in ordered for t in tiles_in(spec, bits(spec))),
    )


def _bf16(values_N: np.ndarray[tuple[int], np.dtype[np.float32]]) -> BitsArray:
    """Returns the upper halves of float32 weights."""
    return (values_N.view(np.uint32) >> 16).astype(np.uint16)
