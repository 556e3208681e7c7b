"""The published layouts of other systems, implemented from their descriptions, for comparisons of sizes.

Each coded stream is decoded again, which proves that its bytes suffice.

- TRL: positions as int32, new values unchanged; not compressed (TRL #5417).
- slime: every byte of a tensor XOR its old byte, zstd level 1 per tensor (slime #1806; SkyRL #1935, stitch).
- NeMo-RL: gaps of 16 bits (32 if one does not fit), new bits XOR old ones, zstd level 1 per bucket (NeMo-RL #2444).
- PULSE: gaps of 32 bits, differences of the bit patterns, zstd level 1 over all tensors (arXiv 2602.03839).

Legend: N elements of a tensor, K changed elements of all tensors of one width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from weightline.bench.timing import best_of
from weightline.types import BitsArray, TensorSpec

Array = npt.NDArray[Any]
Pair = tuple[TensorSpec, BitsArray, BitsArray]
_ZSTD_LEVEL = 1


@dataclass(frozen=True, slots=True)
class PeerLayout:
    """One system's coding of the tensors of one width, given as one flat array or tensor by tensor.

    `encode(old, new)` also compares the states; `decode(stream, old)` returns the new bits.
    """

    system: str
    layout: str
    encode: Callable[[BitsArray, BitsArray], bytes]
    decode: Callable[[bytes, BitsArray], BitsArray]
    joins_tensors: bool


@dataclass(frozen=True, slots=True)
class PeerResult:
    """The results of one layout on one pair of states. Times include the comparison; best of repeats, one thread."""

    system: str
    layout: str
    num_changed: int
    num_elements: int
    payload_nbytes: int
    bytes_per_changed: float
    encode_seconds: float
    decode_seconds: float
    exact: bool


def bench_peers(pairs: Iterable[Pair], repeats: int = 1) -> list[PeerResult]:
    """Measures every layout on (tensor, old bits, new bits) of all tensors. Needs the package `zstandard`."""
    held = list(pairs)
    return [_bench(layout, held, repeats) for layout in peer_layouts()]


def peer_layouts() -> tuple[PeerLayout, ...]:
    """Returns the layouts, in the order of the module's list."""
    return (
        PeerLayout("TRL", "int32 + values", _encode_trl, _decode_trl, joins_tensors=False),
        PeerLayout("slime", "dense XOR, zstd-1", _encode_slime, _decode_slime, joins_tensors=False),
        PeerLayout("NeMo-RL", "16-bit gaps + XOR, zstd-1", _encode_nemo_rl, _decode_nemo_rl, joins_tensors=True),
        PeerLayout("PULSE", "32-bit gaps + differences, zstd-1", _encode_pulse, _decode_pulse, joins_tensors=True),
    )


def _bench(layout: PeerLayout, pairs: Sequence[Pair], repeats: int) -> PeerResult:
    states = _joined(pairs) if layout.joins_tensors else [(old_N, new_N) for _, old_N, new_N in pairs]
    encode_seconds, streams = best_of(repeats, lambda: [layout.encode(old_N, new_N) for old_N, new_N in states])
    both = list(zip(streams, states, strict=True))
    decode_seconds, decoded = best_of(repeats, lambda: [layout.decode(stream, old_N) for stream, (old_N, _) in both])
    exact = all(np.array_equal(found_N, new_N) for found_N, (_, new_N) in zip(decoded, states, strict=True))
    num_changed = sum(int(np.count_nonzero(old_N != new_N)) for old_N, new_N in states)
    nbytes = sum(len(stream) for stream in streams)
    return PeerResult(
        layout.system, layout.layout, num_changed, sum(old_N.size for old_N, _ in states),
        nbytes, nbytes / max(num_changed, 1), encode_seconds, decode_seconds, exact,
    )  # fmt: skip


def _joined(pairs: Sequence[Pair]) -> list[tuple[BitsArray, BitsArray]]:
    """Returns one (old, new) per width: all tensors of that width laid end to end."""
    widths = sorted({old_N.itemsize for _, old_N, _ in pairs})
    groups = [[pair for pair in pairs if pair[1].itemsize == width] for width in widths]
    return [(np.concatenate([p[1] for p in group]), np.concatenate([p[2] for p in group])) for group in groups]


def _encode_trl(old_N: BitsArray, new_N: BitsArray) -> bytes:
    positions_K = np.flatnonzero(old_N != new_N)
    return positions_K.astype(np.int32).tobytes() + new_N[positions_K].tobytes()


def _decode_trl(stream: bytes, old_N: BitsArray) -> BitsArray:
    num_changed = len(stream) // (4 + old_N.itemsize)
    new_N = old_N.copy()
    new_N[np.frombuffer(stream, np.int32, num_changed)] = np.frombuffer(stream, old_N.dtype, offset=4 * num_changed)
    return new_N


def _encode_slime(old_N: BitsArray, new_N: BitsArray) -> bytes:
    return _compress((old_N ^ new_N).tobytes())


def _decode_slime(stream: bytes, old_N: BitsArray) -> BitsArray:
    return old_N ^ np.frombuffer(_decompress(stream), old_N.dtype)


def _encode_nemo_rl(old_N: BitsArray, new_N: BitsArray) -> bytes:
    positions_K, gaps_K = _gaps(old_N, new_N)
    width = np.uint16 if not gaps_K.size or gaps_K.max() < 1 << 16 else np.uint32
    values_K = old_N[positions_K] ^ new_N[positions_K]
    return bytes([np.dtype(width).itemsize]) + _compress(gaps_K.astype(width).tobytes() + values_K.tobytes())


def _decode_nemo_rl(stream: bytes, old_N: BitsArray) -> BitsArray:
    positions_K, values_K = _split(_decompress(stream[1:]), np.dtype(f"<u{stream[0]}"), old_N)
    new_N = old_N.copy()
    new_N[positions_K] ^= values_K
    return new_N


def _encode_pulse(old_N: BitsArray, new_N: BitsArray) -> bytes:
    positions_K, gaps_K = _gaps(old_N, new_N)
    differences_K = new_N[positions_K] - old_N[positions_K]
    return _compress(gaps_K.astype(np.uint32).tobytes() + differences_K.tobytes())


def _decode_pulse(stream: bytes, old_N: BitsArray) -> BitsArray:
    positions_K, differences_K = _split(_decompress(stream), np.dtype(np.uint32), old_N)
    new_N = old_N.copy()
    new_N[positions_K] += differences_K
    return new_N


def _gaps(old_N: BitsArray, new_N: BitsArray) -> tuple[Array, Array]:
    """Returns (positions of changes, distance of each from the one before)."""
    positions_K = np.flatnonzero(old_N != new_N)
    return positions_K, np.diff(positions_K, prepend=0)


def _split(raw: bytes, gap_dtype: np.dtype[Any], old_N: BitsArray) -> tuple[Array, Array]:
    num_changed = len(raw) // (gap_dtype.itemsize + old_N.itemsize)
    gaps_K = np.frombuffer(raw, gap_dtype, num_changed)
    return np.cumsum(gaps_K.astype(np.int64)), np.frombuffer(raw, old_N.dtype, offset=num_changed * gap_dtype.itemsize)


def _compress(raw: bytes) -> bytes:
    import zstandard

    return zstandard.ZstdCompressor(level=_ZSTD_LEVEL).compress(raw)


def _decompress(stream: bytes) -> bytes:
    import zstandard

    return zstandard.ZstdDecompressor().decompress(stream)
