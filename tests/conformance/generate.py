"""Writes the conformance cases, and the JSON Schema of headers. Run by hand, when the format gains something.

Never to make a test pass.

python -m tests.conformance.generate
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import weightline.format
from tests.codec import test_hostile as hostile
from tests.codec.states import DTYPES, Pair, changed, random_bits, whole
from tests.conformance.cases import entry_of, save
from tests.conformance.objects import object_cases
from tests.conformance.shared_objects import header_cases, layout_cases, state_cases
from weightline.codec.capture import capture
from weightline.codec.coding import codings
from weightline.codec.digest import format_digest, tensor_digest
from weightline.format.header import WireHeader
from weightline.format.table import ChunkEntry, pack_table
from weightline.format.write_payload import PayloadInfo, write_anchor, write_delta
from weightline.types import BitsArray, Segment, TensorSpec

MX_DTYPES = ("F8_E8M0", "F4")
STRANGE_NAMES = ("", "../w", "a\0b", "\u00e9\U0001f40d")


def bf16(*bits: int) -> BitsArray:
    return np.array(bits, np.uint16)


def states() -> dict[str, list[Pair]]:
    """Name -> (segment, old, new): every edge that SPEC.md lists."""
    rng = np.random.default_rng(1)
    row = random_bits(rng, "BF16", 400)
    two_ranks = TensorSpec("model.embed.weight", "BF16", (20, 20))
    found: dict[str, list[Pair]] = {
        "no segments": [],
        "no changes": [(whole("frozen.weight", "BF16", 4), bf16(1, 2, 3, 4), bf16(1, 2, 3, 4))],
        "no elements": [(whole("empty", "F32", 0), np.zeros(0, np.uint32), np.zeros(0, np.uint32))],
        "scalar": [(Segment(TensorSpec("scale", "F32", ()), 0, 1), np.array([0x3F800000], np.uint32),
                    np.array([0x3F800001], np.uint32))],
        "unit steps": [(whole("w", "BF16", 6), bf16(0x3F80, 0x3F81, 0xBF80, 0xBF81, 0x3F80, 0x3F80),
                        bf16(0x3F81, 0x3F80, 0xBF81, 0xBF80, 0x3F80, 0x3F7F))],
        "zeros and subnormals": [(whole("w", "BF16", 5), bf16(0, 0x8000, 0, 1, 0x8001),
                                  bf16(0x8000, 0, 1, 0x8001, 0x807F))],
        "infinities and NaN payloads": [(whole("w", "BF16", 5), bf16(0x7F80, 0x7FC0, 0x7FC1, 0xFFFF, 0x7F7F),
                                         bf16(0xFF80, 0x7FC1, 0x7FC0, 0x7FFF, 0x7F80))],
        "everything changed": [(whole("w", "BF16", 64), row[:64], ~row[:64])],
        "second of two ranks": [(Segment(two_ranks, 200, 200), row[200:], changed(rng, row[200:], 0.2))],
        "strange names": [(whole(name, "BF16", 1), bf16(1), bf16(2)) for name in STRANGE_NAMES],
    }  # fmt: skip
    for dtype in (dtype for dtype in DTYPES if dtype not in MX_DTYPES):
        old_N = random_bits(rng, dtype, 60)
        found[f"dtype {dtype}"] = [(whole("w", dtype, 60), old_N, changed(rng, old_N, 0.3))]
    found["mixed dtypes"] = [
        (whole(f"layer.{n}.w", dtype, 20), *_two(rng, dtype, 20))
        for n, dtype in enumerate(["BF16", "F32", "BF16", "U8"])
    ]
    found["several pieces with changes"] = [
        (whole(f"layer.{n}.w", "BF16", 90), *_two(rng, "BF16", 90)) for n in range(3)
    ]
    sparse_rng = np.random.default_rng(2)
    sparse = random_bits(sparse_rng, "BF16", 1500)
    found["few changes"] = [(whole("w", "BF16", 1500), sparse, changed(sparse_rng, sparse, 0.02))]
    far = sparse.copy()
    far[[*range(0, 300, 12), 1400]] ^= np.uint16(1)
    found["a gap far above the mean"] = [(whole("w", "BF16", 1500), sparse, far)]
    # Dtypes that came later draw from a generator of their own, so that the cases above stay as they are.
    mx_rng = np.random.default_rng(3)
    for dtype in MX_DTYPES:
        tensor, old_N = TensorSpec("w", dtype, (32, 8)), random_bits(mx_rng, dtype, 256)
        found[f"dtype {dtype}"] = [(Segment(tensor, 0, 256), old_N, changed(mx_rng, old_N, 0.3))]
    return found


def _two(rng: np.random.Generator, dtype: str, num_elements: int) -> tuple[BitsArray, BitsArray]:
    old_N = random_bits(rng, dtype, num_elements)
    return old_N, changed(rng, old_N, 0.4)


def written(write: Callable[[Path], PayloadInfo]) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "payload"
        write(path)
        return path.read_bytes().hex()


def delta_case(name: str, pairs: list[Pair], coding: str) -> dict[str, Any]:
    payload = written(lambda path: write_delta(path, [capture(*pair, ranked=True) for pair in pairs], coding))
    segments = [entry_of(segment, old=old_N, new=new_N) for segment, old_N, new_N in pairs]
    return {"case": name, "coding": coding, "segments": segments, "payload": payload}


def anchor_case(name: str, pairs: list[Pair]) -> dict[str, Any]:
    payload = written(lambda path: write_anchor(path, [(segment, old_N) for segment, old_N, _ in pairs]))
    return {"case": name, "segments": [entry_of(s, bits=old_N) for s, old_N, _ in pairs], "payload": payload}


def digest_cases(name: str, pairs: list[Pair]) -> list[dict[str, Any]]:
    return [
        {"case": name, **entry_of(s, bits=old_N), "digest": format_digest(tensor_digest(s, old_N))}
        for s, old_N, _ in pairs
    ]


def refused_cases() -> list[dict[str, Any]]:
    """The crafted payloads of the hostile tests, each with the one rule that it breaks."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found = [(raw, rule) for raw, rule in hostile.HEADERS if len(raw) < 4096]
        found += [(hostile.put(folder / "p", b"", table).read_bytes(), rule) for table, rule in hostile.TABLES]
        for segments, entries, chunks, rule in hostile.LAYOUTS:
            table = pack_table(segments, [ChunkEntry(*entry) for entry in entries])
            found.append((hostile.put(folder / "p", chunks, table).read_bytes(), rule))
        crafted = [("gap", positions, hostile.UNIT_STEPS, rule) for positions, rule in hostile.GAP_POSITIONS]
        crafted += [
            ("gap-by-magnitude", positions, hostile.UNIT_STEPS, rule) for positions, rule in hostile.MAGNITUDE_POSITIONS
        ]
        crafted += [("gap", hostile.SOUND_POSITIONS, steps, rule) for steps, rule in hostile.STEPS]
        for coding, positions, steps, rule in crafted:
            found.append((hostile.crafted(folder, coding, positions, steps, 2).read_bytes(), rule))
    cases = [{"case": rule, "payload": raw.hex(), "error": "payload", "rule": rule} for raw, rule in found]
    future = hostile.header(f"{{{hostile.META},{hostile.ENTRIES}}}".replace(':"1"', ':"2"'), b"\x03\0")
    return [*cases, {"case": "another format", "payload": future.hex(), "error": "unsupported-feature"}]


def main() -> None:
    found = states()
    save("deltas", [delta_case(name, pairs, coding) for coding in codings() for name, pairs in found.items()])
    save("anchors", [anchor_case(name, pairs) for name, pairs in found.items()])
    save("refused", refused_cases())
    save("objects", [*object_cases(), *header_cases()])
    save("layouts", layout_cases())
    save("states", state_cases())
    schema = Path(weightline.format.__file__).with_name("header.schema.json")
    schema.write_text(json.dumps(WireHeader.model_json_schema(), indent=1) + "\n")
    save("digests", [case for name, pairs in found.items() for case in digest_cases(name, pairs)])


if __name__ == "__main__":
    main()
