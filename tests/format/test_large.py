"""Payloads of tensors with more than 2**31 elements. Zeros that are only read take no memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.codec.states import whole
from weightline.codec.capture import capture
from weightline.codec.coding import coding_named, codings
from weightline.format.payload import open_payload
from weightline.format.write_payload import write_delta

_NUM_ELEMENTS = (1 << 31) + 64
_AT = [0, (1 << 31) - 1, 1 << 31, _NUM_ELEMENTS - 1]


@pytest.mark.parametrize("coding", sorted(codings()))
def test_changes_beyond_two_to_the_31_are_written_and_read(tmp_path: Path, coding: str) -> None:
    segment = whole("w", "U8", _NUM_ELEMENTS)
    old_N, new_N = np.zeros(_NUM_ELEMENTS, np.uint8), np.zeros(_NUM_ELEMENTS, np.uint8)
    new_N[_AT] = [7, 8, 9, 10]
    write_delta(tmp_path / "p", [capture(segment, old_N, new_N, ranked=coding_named(coding).ranked)], coding)
    [changes] = open_payload(tmp_path / "p").read_changes(None, lambda _: old_N)
    assert changes.segment == segment
    assert changes.positions_K.tolist() == _AT
    assert (changes.old_K.tolist(), changes.new_K.tolist()) == ([0] * 4, [7, 8, 9, 10])
