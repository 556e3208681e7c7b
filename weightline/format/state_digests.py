"""The state digests of a version's tensors as one array, their lists and changes in a bucket, and their root.

A *list* is an object of 16 bytes for each tensor, in the order of the layout. A header names a list and contains the
*changes* against it. The *root* is one hash over the layout and all digests. SPEC "Digests and root".
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Self

import numpy as np
import numpy.typing as npt

from weightline.codec.digest import format_digest
from weightline.codec.varint import NumberReader, put_numbers
from weightline.errors import InputError, ManifestError, PayloadError
from weightline.format.tensor_layout import Layout

#: Shape (T, 2): of each tensor the high lane, then the low lane.
DigestArray = npt.NDArray[np.uint64]

DIGEST_NBYTES = 16
ROOT_FORMAT = b"weightline-root/2\n"
_MASK = (1 << 64) - 1
_STORED = np.dtype(">u8")


class StateDigests(Mapping[str, int]):
    """The digest of every tensor of a layout: a mapping from names to 128-bit integers over one array.

    Those that a chain returns are read-only and shared. `copy` returns one that can be changed. The set of tensors
    never changes.
    """

    __slots__ = ("digests_T", "layout")

    def __init__(self, layout: Layout, digests_T: DigestArray) -> None:
        self.layout = layout
        self.digests_T = digests_T

    @classmethod
    def zeros(cls, layout: Layout) -> Self:
        """Returns the digests of a state before any element is added to it."""
        return cls(layout, np.zeros((len(layout), 2), np.uint64))

    @classmethod
    def of(cls, layout: Layout, digests: Mapping[str, int]) -> Self:
        """Returns the digests of these tensors. InputError when one of the layout is missing."""
        if isinstance(digests, StateDigests) and digests.layout == layout:
            return cls(layout, digests.digests_T)
        try:
            rows = [((digests[spec.name] >> 64), digests[spec.name] & _MASK) for spec in layout.specs]
        except KeyError as error:
            raise InputError(f"tensor {error} has no digest", tensor=str(error)) from error
        return cls(layout, np.array(rows, np.uint64).reshape(-1, 2))

    def __getitem__(self, name: str) -> int:
        high, low = self.digests_T[self.layout.index[name]]
        return int(high) << 64 | int(low)

    def __setitem__(self, name: str, digest: int) -> None:
        self.digests_T[self.layout.index[name]] = digest >> 64, digest & _MASK

    def __iter__(self) -> Iterator[str]:
        return iter(self.layout.index)

    def __len__(self) -> int:
        return len(self.layout)

    def __contains__(self, name: object) -> bool:
        return name in self.layout.index

    def __eq__(self, other: object) -> bool:
        if isinstance(other, StateDigests) and self.layout == other.layout:
            return np.array_equal(self.digests_T, other.digests_T)
        return isinstance(other, Mapping) and dict(self) == dict(other)

    def copy(self) -> Self:
        """Returns digests that can be changed."""
        return type(self)(self.layout, self.digests_T.copy())

    def formatted(self) -> dict[str, str]:
        """Returns the digests by name, each as 32 hex digits."""
        return {name: format_digest(digest) for name, digest in self.items()}

    def differing(self, other: StateDigests) -> list[str]:
        """Returns the names of the tensors that have other digests in `other`, which has the same layout."""
        places = np.flatnonzero((self.digests_T != other.digests_T).any(axis=1))
        return [self.layout.specs[at].name for at in places]

    def root(self, layout_sha256: str) -> str:
        """Returns the root of the state, in hex. `layout_sha256`: of the layout's object that the header names."""
        return root_of(layout_sha256, self.digests_T)


def root_of(layout_sha256: str, digests_T: DigestArray) -> str:
    """Returns the sha256 over the layout's sha256 and all digests in its order, in hex."""
    hashed = hashlib.sha256(ROOT_FORMAT)
    hashed.update(bytes.fromhex(layout_sha256))
    hashed.update(pack_list(digests_T))
    return hashed.hexdigest()


def pack_list(digests_T: DigestArray) -> bytes:
    """Returns the bytes of a list of digests: 16 for each tensor, the high lane first."""
    return digests_T.astype(_STORED).tobytes()


def unpack_list(raw: bytes, num_tensors: int) -> DigestArray:
    """Inverts `pack_list`; the array is read-only. ManifestError for a list of another length."""
    if len(raw) != DIGEST_NBYTES * num_tensors:
        raise ManifestError(f"a list of {len(raw)} bytes holds no {num_tensors} digests", rule="digests-length")
    digests_T = np.frombuffer(raw, _STORED).reshape(num_tensors, 2).astype(np.uint64)
    digests_T.setflags(write=False)
    return digests_T


def pack_changes(before_T: DigestArray, after_T: DigestArray) -> tuple[bytes, int]:
    """Returns the changes that lead from one list to another one, and their number.

    Each is the number of unchanged tensors before it (unsigned LEB128), then the new digest.
    """
    places = np.flatnonzero((before_T != after_T).any(axis=1)).tolist()
    stored = pack_list(after_T[places])
    out, end = bytearray(), 0
    for number, at in enumerate(places):
        put_numbers(out, at - end)
        out += stored[DIGEST_NBYTES * number : DIGEST_NBYTES * (number + 1)]
        end = at + 1
    return bytes(out), len(places)


def apply_changes(digests_T: DigestArray, changes: bytes) -> DigestArray:
    """Returns the list with the changes applied, read-only. ManifestError for changes that break a rule."""
    if not changes:
        return digests_T
    changed_T = digests_T.copy()
    reader = NumberReader(changes, "changes")
    at = -1
    try:
        while reader.num_left:
            at += 1 + reader.number()
            if at >= len(changed_T):
                raise ManifestError(f"a change of tensor {at} of {len(changed_T)}", rule="changes-index")
            digest = reader.take(DIGEST_NBYTES)
            changed_T[at] = int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:], "big")
    except PayloadError as error:
        raise ManifestError(f"changes of digests: {error}", rule="changes") from error
    changed_T.setflags(write=False)
    return changed_T
