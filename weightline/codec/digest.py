"""State digest: a sum over the elements of a tensor, so that digests of parts add up and updates cost O(changes).

A digest is two 64-bit lanes, each a sum modulo 2**64, packed high << 64 | low into one 128-bit integer. Two independent
lanes have no carries, unlike one 128-bit sum, so a lane is one machine word in every loop and on every device.

Per element, with seeds s0 and s1 of the tensor (blake2b of its name, dtype and shape), index i (row-major, of the
tensor) and bits b, everything modulo 2**64:

    x = s0 + i * 0x9E3779B97F4A7C15 + b
    y = (x ^ x >> 32) * 0xBF58476D1CE4E5B9;  y = y ^ y >> 29;  low  += y
    z = (y ^ s1)      * 0x94D049BB133111EB;  z = z ^ z >> 32;  high += z

For a fixed index every line is a bijection of b: one flipped bit always changes both summands. The digest detects
accidental corruption. It is not a cryptographic hash.

Legend: N elements, K changed elements.
"""

from __future__ import annotations

import hashlib
import json

import numpy as np
import numpy.typing as npt

from weightline.codec.capture import check_bits
from weightline.errors import InputError
from weightline.types import BitsArray, Changes, Segment, TensorSpec

_MASK = (1 << 64) - 1
_LIMB = (1 << 32) - 1


def tensor_seeds(tensor: TensorSpec) -> tuple[int, int]:
    """Returns the two lane seeds: blake2b-128 of the tensor's name, dtype and shape as compact JSON."""
    identity = json.dumps([tensor.name, tensor.dtype, list(tensor.shape)], separators=(",", ":"), ensure_ascii=True)
    raw = hashlib.blake2b(identity.encode(), digest_size=16).digest()
    return int.from_bytes(raw[:8], "little"), int.from_bytes(raw[8:], "little")


def tensor_digest(segment: Segment, bits_N: BitsArray) -> int:
    """Returns the segment's part of its tensor's digest. The parts of any partition of a tensor add up to its digest.

    Pure, safe in threads. Raises InputError when the array does not have the segment's length and width.
    """
    from weightline.codec.kernels import mixing

    seed_0, seed_1 = tensor_seeds(segment.tensor)
    bits_N = np.ascontiguousarray(check_bits(segment, bits_N))
    return _pack(*mixing.mix_range(bits_N, np.uint64(segment.start), np.uint64(seed_0), np.uint64(seed_1)))


def digest_change(changes: Changes) -> int:
    """Returns the difference of the new and the old state's digest. Pure, safe in threads."""
    from weightline.codec.kernels import mixing

    seed_0, seed_1 = tensor_seeds(changes.segment.tensor)
    start = np.uint64(changes.segment.start)
    return _pack(
        *mixing.mix_change(
            changes.positions_K, changes.old_K, changes.new_K, start, np.uint64(seed_0), np.uint64(seed_1)
        )
    )


def _pack(low: np.uint64, high: np.uint64) -> int:
    return int(high) << 64 | int(low)


def add_digests(a: int, b: int) -> int:
    """Returns the lane-wise sum."""
    return ((((a >> 64) + (b >> 64)) & _MASK) << 64) | (((a & _MASK) + (b & _MASK)) & _MASK)


def format_digest(digest: int) -> str:
    """Returns the digest as 32 lower-case hex digits, the high lane first."""
    return f"{digest:032x}"


def parse_digest(text: str) -> int:
    """Inverts `format_digest`. InputError for any other text."""
    if len(text) != 32 or any(c not in "0123456789abcdef" for c in text):
        raise InputError(f"a digest is 32 lower-case hex digits, not {text!r}", digest=text)
    return int(text, 16)


def digest_to_limbs(digest: int) -> tuple[int, int, int, int]:
    """Returns four 32-bit limbs, lowest first. Sums over up to 2**31 ranks fit an int64 tensor (one all-reduce)."""
    return (digest & _LIMB, (digest >> 32) & _LIMB, (digest >> 64) & _LIMB, digest >> 96)


def limbs_to_digest(limbs: tuple[int, int, int, int] | list[int]) -> int:
    """Returns the digest of summed limbs: carries move up within a lane and wrap at its end."""
    low0, low1, high0, high1 = (int(limb) for limb in limbs)
    return (((high0 + (high1 << 32)) & _MASK) << 64) | ((low0 + (low1 << 32)) & _MASK)


def limbs_to_lanes(limbs_T: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
    """Returns the lanes of T summed digests, shape (T, 2), high lane first: `limbs_to_digest` of many at once."""
    limbs = limbs_T.astype(np.uint64)
    shift = np.uint64(32)
    return np.stack([limbs[:, 2] + (limbs[:, 3] << shift), limbs[:, 0] + (limbs[:, 1] << shift)], axis=1)
