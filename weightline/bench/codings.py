"""Measures the codings on two states of one model.

Legend: N elements of a tensor, K changed elements.
"""

from __future__ import annotations

import ctypes
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from weightline.bench.timing import best_of
from weightline.codec.capture import capture
from weightline.codec.coding import coding_named, codings
from weightline.format.payload import open_payload
from weightline.format.write_payload import write_delta
from weightline.types import BitsArray, Changes, TensorSpec, whole

Pair = tuple[TensorSpec, BitsArray, BitsArray]


@dataclass(frozen=True, slots=True)
class CodingResult:
    """The results of one coding on one pair of states. Times are the best of the repeats, on one thread.

    payload_nbytes counts all bytes of the payload. memcmp_seconds is the time in which the C library compares one state
    with an equal copy: a lower bound for any capture.
    """

    coding: str
    num_changed: int
    num_elements: int
    payload_nbytes: int
    bytes_per_changed: float
    capture_seconds: float
    encode_seconds: float
    decode_seconds: float
    apply_seconds: float
    memcmp_seconds: float
    exact: bool


def bench_codings(pairs: Iterable[Pair], repeats: int = 7) -> list[CodingResult]:
    """Measures every coding on (tensor, old bits, new bits) of all tensors. Holds two copies of the states in memory.

    Encoding writes a payload into a temporary folder; decoding reads it back; applying scatters into a copy of the old
    state, which is then compared with the new one, bit by bit.
    """
    held = list(pairs)
    memcmp_seconds = _measure_memcmp(held, repeats)
    return [_bench(name, held, memcmp_seconds, repeats) for name in codings()]


def _bench(name: str, pairs: Sequence[Pair], memcmp_seconds: float, repeats: int) -> CodingResult:
    ranked = coding_named(name).ranked
    segments = {tensor.name: whole(tensor) for tensor, _, _ in pairs}
    base = {tensor.name: old_N for tensor, old_N, _ in pairs}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "payload.safetensors"
        capture_seconds, changes = best_of(
            repeats, lambda: [capture(segments[t.name], old_N, new_N, ranked=ranked) for t, old_N, new_N in pairs]
        )
        # A writer's payload is a new file. Truncating an old one takes the file system as long as a small encoding, so
        # the file is deleted before each run.
        encode_seconds, info = best_of(repeats, lambda: write_delta(path, changes, name), path.unlink)
        decode_seconds, decoded = best_of(
            repeats, lambda: list(open_payload(path).read_changes(None, lambda segment: base[segment.tensor.name]))
        )
    state = {name: old_N.copy() for name, old_N in base.items()}
    apply_seconds, _ = best_of(repeats, lambda: _apply(decoded, state))
    exact = all(np.array_equal(state[tensor.name], new_N) for tensor, _, new_N in pairs)
    return CodingResult(
        name, info.num_changed, info.num_elements, info.nbytes, info.nbytes / max(info.num_changed, 1),
        capture_seconds, encode_seconds, decode_seconds, apply_seconds, memcmp_seconds, exact,
    )  # fmt: skip


def _apply(changes: Sequence[Changes], state: dict[str, BitsArray]) -> None:
    for change in changes:
        state[change.segment.tensor.name][change.positions_K] = change.new_K


def _measure_memcmp(pairs: Sequence[Pair], repeats: int) -> float:
    memcmp = ctypes.CDLL(None).memcmp
    memcmp.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
    copies = [(old_N, old_N.copy()) for _, old_N, _ in pairs]
    return best_of(repeats, lambda: [memcmp(a.ctypes.data, b.ctypes.data, a.nbytes) for a, b in copies])[0]
