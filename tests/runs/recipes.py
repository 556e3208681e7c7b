"""Recipes for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

TOY: dict[str, Any] = {
    "name": "toy",
    "device": "cpu",
    "num_processes": 2,
    "model": {"tiny": {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8}},
    "stages": [
        {"kind": "sft", "max_steps": 4, "learning_rate": 1e-3, "sync_steps": 2},
        {"kind": "dpo", "max_steps": 2, "learning_rate": 1e-4},
    ],
}


def write_recipe(folder: Path, **changes: Any) -> Path:
    """The toy recipe with some fields changed. JSON is YAML."""
    path = folder / "recipe.yaml"
    path.write_text(json.dumps({**TOY, **changes}))
    return path
