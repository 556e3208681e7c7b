from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given

from tests.codec.states import DTYPES, Pair, pairs, random_bits, whole
from weightline.codec import torch_ops
from weightline.codec.capture import capture
from weightline.codec.pieces import RankedChanges
from weightline.codec.torch_ops import bits_of, capture_tensor, dtype_code
from weightline.errors import InputError
from weightline.types import BitsArray, Changes, Segment

TORCH_DTYPES = {code: torch_ops.torch_dtype(code) for code in DTYPES}


def as_tensor(bits_N: BitsArray, dtype: str) -> torch.Tensor:
    return torch.from_numpy(bits_N.copy().view(f"i{bits_N.itemsize}")).view(TORCH_DTYPES[dtype])


def on_device(segment: Segment, old: torch.Tensor, new: torch.Tensor, ranked: bool) -> Changes:
    """What an accelerator would do, on the CPU."""
    return torch_ops.capture_on_device(segment, *(torch_ops.flat_bits(segment, t) for t in (old, new)), ranked=ranked)


def assert_same(found: Changes, expected: Changes) -> None:
    assert isinstance(found, RankedChanges) == isinstance(expected, RankedChanges)
    names = ["positions_K", "old_K", "new_K"] + (["ranks_K"] if isinstance(found, RankedChanges) else [])
    for name in names:
        left, right = getattr(found, name), getattr(expected, name)
        assert left.dtype == right.dtype, name
        assert np.array_equal(left, right), name


@pytest.mark.parametrize("ranked", [False, True])
@given(pair=pairs())
def test_capture_of_tensors_is_capture_of_their_bits(ranked: bool, pair: Pair) -> None:
    segment, old_N, new_N = pair
    old, new = (as_tensor(bits_N, segment.tensor.dtype) for bits_N in (old_N, new_N))
    expected = capture(segment, old_N, new_N, ranked=ranked)
    assert_same(capture_tensor(segment, old, new, ranked=ranked), expected)
    assert_same(on_device(segment, old, new, ranked), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_are_a_view(dtype: str) -> None:
    bits_N = random_bits(np.random.default_rng(1), dtype, 12)
    tensor = as_tensor(bits_N, dtype)
    assert dtype_code(tensor.dtype) == dtype
    view_N = bits_of(tensor.reshape(3, 4))
    assert np.array_equal(view_N, bits_N)
    view_N[5] = 0
    assert np.array_equal(bits_of(tensor), view_N)


def test_parameters_that_want_gradients_are_taken() -> None:
    weight = torch.nn.Parameter(torch.ones(6, dtype=torch.bfloat16))
    assert bits_of(weight).tolist() == [0x3F80] * 6
    changes = capture_tensor(whole("w", "BF16", 6), weight, torch.zeros(6, dtype=torch.bfloat16))
    assert changes.num_changed == 6


def test_wrong_tensors_are_refused() -> None:
    segment = whole("layer.weight", "BF16", 6)
    good = torch.zeros(6, dtype=torch.bfloat16)
    for bad in (torch.zeros(5, dtype=torch.bfloat16), torch.zeros(6, dtype=torch.float16)):
        with pytest.raises(InputError, match=r"layer\.weight"):
            capture_tensor(segment, good, bad)
    with pytest.raises(InputError, match="one device"):
        capture_tensor(segment, good, torch.zeros(6, dtype=torch.bfloat16, device="meta"))
    with pytest.raises(InputError, match="contiguous"):
        bits_of(torch.zeros(4, 4).t())
    with pytest.raises(InputError, match="complex64"):
        dtype_code(torch.complex64)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", ["BF16", "F32", "F8_E4M3"])
def test_capture_stays_on_the_gpu(dtype: str) -> None:
    rng = np.random.default_rng(2)
    old_N, new_N = (random_bits(rng, dtype, 5_000_000) for _ in range(2))
    old, new = (as_tensor(bits_N, dtype).cuda() for bits_N in (old_N, new_N))
    segment = whole("w", dtype, old_N.size)
    assert_same(capture_tensor(segment, old, new, ranked=True), capture(segment, old_N, new_N, ranked=True))
