"""Arranges tensors as a table of the model: one row per layer, one column per kind of module. Pure.

It parses the names of checkpoints, as in `model.layers.3.mlp.up_proj.weight`. Experts of one layer share a cell.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

_LAYER = re.compile(r"^(?:.*\.)?(?:layers|layer|h|blocks|block)\.(?P<layer>\d+)\.(?P<module>.+)$")
_EXPERT = re.compile(r"\.\d+\.")
_SUFFIX = re.compile(r"\.(weight|default\.weight)$")


@dataclass(frozen=True, slots=True)
class TensorChange:
    """The difference of one tensor between two states."""

    name: str
    num_elements: int
    is_different: bool
    num_changed: int | None
    """Number of changed elements; None when they were not counted."""


def place_of(name: str) -> tuple[int | None, str]:
    """Returns (layer, module) of a tensor. Embeddings, the last norm and the head have no layer."""
    found = _LAYER.match(name)
    if found is None:
        return None, _SUFFIX.sub("", name)
    return int(found["layer"]), _SUFFIX.sub("", _EXPERT.sub(".", found["module"]))


def layer_picture(tensors: Iterable[TensorChange]) -> dict[str, Any]:
    """Returns the columns in order of appearance, and each cell's numbers of tensors and elements."""
    cells: dict[tuple[int | None, str], list[TensorChange]] = {}
    for tensor in tensors:
        cells.setdefault(place_of(tensor.name), []).append(tensor)
    columns = list(dict.fromkeys(module for layer, module in cells if layer is not None))
    layers = sorted({layer for layer, _ in cells if layer is not None})
    return {
        "columns": columns,
        "layers": [
            {"layer": layer, "cells": [_cell(cells.get((layer, column), [])) for column in columns]} for layer in layers
        ],
        "outside": [{"name": name, **_counts(found)} for (layer, name), found in cells.items() if layer is None],
    }


def _cell(tensors: list[TensorChange]) -> dict[str, Any] | None:
    return _counts(tensors) if tensors else None


def _counts(tensors: list[TensorChange]) -> dict[str, Any]:
    counts = [tensor.num_changed for tensor in tensors if tensor.num_changed is not None]
    return {
        "num_tensors": len(tensors),
        "num_different": sum(tensor.is_different for tensor in tensors),
        "num_elements": sum(tensor.num_elements for tensor in tensors),
        "num_changed": sum(counts) if len(counts) == len(tensors) else None,
    }
