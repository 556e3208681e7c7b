"""A worker's write in the pause: every box is written and read back, and a write that did not take is found."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from weightline.errors import DigestMismatchError
from weightline.serving.engines.vllm.memory import BoxChanges, StagedChanges


def _changes(name: str, flat: torch.Tensor, at: list[int], rng: np.random.Generator) -> BoxChanges:
    at_K = torch.tensor(at)
    new_K = torch.from_numpy(rng.integers(-(2**15), 2**15, len(at)).astype(np.int16))
    return BoxChanges(name, flat, at_K, flat[at_K].clone(), new_K)


def test_all_boxes_are_written_and_come_back() -> None:
    rng = np.random.default_rng(0)
    flats = [torch.from_numpy(rng.integers(-(2**15), 2**15, size).astype(np.int16)) for size in (1, 100, 20_000)]
    before = [flat.clone() for flat in flats]
    boxes = tuple(
        _changes(str(number), flat, sorted(rng.choice(len(flat), max(1, len(flat) // 3), replace=False).tolist()), rng)
        for number, flat in enumerate(flats)
    )
    staged = StagedChanges(boxes, {}, 0)
    staged.check_base()
    staged.write(is_undo=False)
    for flat, old, one in zip(flats, before, boxes, strict=True):
        expected = old.clone()
        expected[one.at_K] = one.new_K
        assert torch.equal(flat, expected)
    staged.write(is_undo=True)
    assert all(torch.equal(flat, old) for flat, old in zip(flats, before, strict=True))


def test_memory_that_does_not_hold_what_was_written_is_named() -> None:
    """Two bits for one element cannot both be there."""
    flat = torch.zeros(100, dtype=torch.int16)
    old_K, new_K = torch.zeros(3, dtype=torch.int16), torch.tensor([1, 2, 3], dtype=torch.int16)
    one = BoxChanges("layers.0", flat, torch.tensor([10, 11, 10]), old_K, new_K)
    with pytest.raises(DigestMismatchError, match=r"layers\.0"):
        StagedChanges((one,), {}, 0).write(is_undo=False)
