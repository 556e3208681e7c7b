"""Conformance cases: language-neutral JSON, bits and bytes as hex (little-endian). SPEC.md says what they mean."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from weightline.dtypes import bits_dtype
from weightline.types import BitsArray, Segment, TensorSpec

FOLDER = Path(__file__).parent / "cases"


def load(topic: str) -> list[dict[str, Any]]:
    """The cases of one file."""
    cases: list[dict[str, Any]] = json.loads((FOLDER / f"{topic}.json").read_text())
    return cases


def save(topic: str, cases: list[dict[str, Any]]) -> None:
    (FOLDER / f"{topic}.json").write_text(json.dumps(cases, indent=1) + "\n")


def segment_of(entry: dict[str, Any]) -> Segment:
    return Segment(TensorSpec(entry["name"], entry["dtype"], tuple(entry["shape"])), entry["start"], entry["length"])


def bits_of(entry: dict[str, Any], field: str) -> BitsArray:
    return np.frombuffer(bytes.fromhex(entry[field]), bits_dtype(entry["dtype"]))


def entry_of(segment: Segment, **bits: BitsArray) -> dict[str, Any]:
    tensor = segment.tensor
    place = {"name": tensor.name, "dtype": tensor.dtype, "shape": list(tensor.shape)}
    place |= {"start": segment.start, "length": segment.length}
    return place | {field: array.tobytes().hex() for field, array in bits.items()}
