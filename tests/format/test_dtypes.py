from __future__ import annotations

import pytest
import torch

from weightline.codec.torch_ops import dtype_code, torch_dtype
from weightline.dtypes import DTYPES, bits_dtype, signed_dtype


def test_the_order_of_dtypes_never_changes() -> None:
    """Payload tables store indices into it: a later dtype goes to the end."""
    assert list(DTYPES) == [
        "BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "U16", "I16", "F16", "BF16", "U32", "I32", "F32", "U64", "I64", "F64",
        "F8_E8M0", "F4",
    ]  # fmt: skip


@pytest.mark.parametrize("code", DTYPES)
def test_torch_and_numpy_agree_with_the_table(code: str) -> None:
    dtype = DTYPES[code]
    found = torch_dtype(code)
    assert dtype_code(found) == code
    assert torch.empty(0, dtype=found).element_size() == dtype.itemsize
    assert found.is_floating_point == (dtype.is_float or code in ("F8_E8M0", "F4"))
    assert bits_dtype(code).itemsize == signed_dtype(code).itemsize == dtype.itemsize
    assert (bits_dtype(code).kind, signed_dtype(code).kind) == ("u", "i")
