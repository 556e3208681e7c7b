"""Writing changed elements into a model's own storage."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from weightline.codec.capture import capture
from weightline.codec.torch_ops import dtype_code
from weightline.dtypes import bits_dtype
from weightline.errors import ApplyError
from weightline.serving.engines.in_place import LiveWeights
from weightline.types import Changes, TensorSpec, whole

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int8, torch.int64, torch.float8_e4m3fn]


class _Holder(torch.nn.Module):
    def __init__(self, tensor: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("w", tensor)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_bit_pattern_of_any_dtype_lands_in_the_same_storage(dtype: torch.dtype) -> None:
    rng = np.random.default_rng(0)
    tensor = torch.zeros((7, 11), dtype=dtype)
    held = LiveWeights(_Holder(tensor))
    spec = TensorSpec("w", dtype_code(dtype), (7, 11))
    assert held.specs == {"w": spec}
    new_N = rng.integers(0, 256, spec.nbytes, np.uint8).view(bits_dtype(spec.dtype))
    changes = capture(whole(spec), held.read_bits("w"), new_N)
    assert changes.num_changed > 60
    held.scatter(changes)
    np.testing.assert_array_equal(held.read_bits("w"), new_N, strict=True)
    np.testing.assert_array_equal(held.read_elements("w", changes.positions_K), changes.new_K, strict=True)
    assert bytes(tensor.untyped_storage()) == new_N.tobytes()


def test_a_tied_tensor_has_both_names_and_one_storage() -> None:
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(3, 2, bias=False), "b": torch.nn.Linear(3, 2, bias=False)})
    model["b"].weight = model["a"].weight
    held = LiveWeights(model)
    spec = held.specs["a.weight"]
    held.scatter(
        Changes(whole(spec), np.array([4]), held.read_elements("a.weight", np.array([4])), np.array([7], "<u4"))
    )
    assert held.read_elements("b.weight", np.array([4])) == 7


def test_what_cannot_be_written_in_place_is_refused() -> None:
    with pytest.raises(ApplyError, match="w is not contiguous"):
        LiveWeights(_Holder(torch.zeros(4, 3).T))
    with pytest.raises(ApplyError, match="w has no data"):
        LiveWeights(_Holder(torch.zeros(4, 3, device="meta")))


@pytest.mark.parametrize(("shape", "position"), [((4, 3), 12), ((4, 3), -1), ((3, 4), 0)])
def test_changes_that_do_not_fit_write_nothing(shape: tuple[int, int], position: int) -> None:
    tensor = torch.zeros(4, 3)
    spec = TensorSpec("w", "F32", shape)
    changes = Changes(whole(spec), np.array([position]), np.array([0], "<u4"), np.array([1], "<u4"))
    with pytest.raises(ApplyError):
        LiveWeights(_Holder(tensor)).scatter(changes)
    assert not tensor.any()
