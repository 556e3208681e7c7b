"""Bits that were just read from an engine: a delta is decoded rank by rank, and each rank asks for the same tensors.

Legend: N elements of a tensor.
"""

from __future__ import annotations

from collections import OrderedDict

from weightline.types import BitsArray

_MAX_NBYTES = 2 * 1024**3


class RecentBits:
    """The tensors read last, up to a number of bytes. To be cleared whenever the weights change."""

    def __init__(self, max_nbytes: int = _MAX_NBYTES) -> None:
        self._max_nbytes = max_nbytes
        self._held: OrderedDict[str, BitsArray] = OrderedDict()

    def get(self, name: str) -> BitsArray | None:
        """The tensor's N bits, if they are here."""
        bits_N = self._held.get(name)
        if bits_N is not None:
            self._held.move_to_end(name)
        return bits_N

    def put(self, name: str, bits_N: BitsArray) -> None:
        self._held[name] = bits_N
        while len(self._held) > 1 and sum(held.nbytes for held in self._held.values()) > self._max_nbytes:
            self._held.popitem(last=False)

    def clear(self) -> None:
        self._held.clear()
