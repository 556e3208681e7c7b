"""The table of the dtypes that a chain can hold, with their names in numpy, torch and safetensors. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import numpy as np

#: The dtype of published weights: as training holds them, one by name, or auto, the one that the model is served in.
DtypeSetting = Literal["auto", "held", "bfloat16", "float16", "float32"]

#: The dtypes of MX formats that no IEEE float resembles.
MX_CODES = frozenset({"F8_E8M0", "F4"})


@dataclass(frozen=True, slots=True)
class Dtype:
    """One dtype. Elements are little-endian on every host."""

    code: str
    """Its name in safetensors headers, manifests and recipes."""
    itemsize: int
    """Bytes of one element."""
    torch_name: str
    """The attribute of `torch`. The writer of the safetensors package takes the same names."""
    bits: np.dtype[np.unsignedinteger[Any]]
    """The unsigned integers that hold an element's bits."""
    signed: np.dtype[np.signedinteger[Any]]
    """Signed integers of the same width. Steps have this dtype, and torch can scatter it on every device."""
    num_packed: int = 1
    """Values that one element holds. Headers of safetensors count values in the last dimension; torch and manifests
    count elements."""

    @property
    def is_float(self) -> bool:
        """Returns whether the top bit is a sign with a magnitude below it, as in IEEE floats.

        F8_E8M0 has no sign: its bits are in the order of its values. An element of F4 is two values.
        """
        return "float" in self.torch_name and self.code not in MX_CODES


def _dtype(code: str, itemsize: int, torch_name: str, num_packed: int = 1) -> Dtype:
    return Dtype(code, itemsize, torch_name, np.dtype(f"<u{itemsize}"), np.dtype(f"<i{itemsize}"), num_packed)


#: By code. Payload tables store the index of a dtype in this order, so the order is part of the format: append only.
DTYPES: Mapping[str, Dtype] = MappingProxyType({
    dtype.code: dtype
    for dtype in (
        _dtype("BOOL", 1, "bool"),
        _dtype("U8", 1, "uint8"),
        _dtype("I8", 1, "int8"),
        _dtype("F8_E4M3", 1, "float8_e4m3fn"),
        _dtype("F8_E5M2", 1, "float8_e5m2"),
        _dtype("U16", 2, "uint16"),
        _dtype("I16", 2, "int16"),
        _dtype("F16", 2, "float16"),
        _dtype("BF16", 2, "bfloat16"),
        _dtype("U32", 4, "uint32"),
        _dtype("I32", 4, "int32"),
        _dtype("F32", 4, "float32"),
        _dtype("U64", 8, "uint64"),
        _dtype("I64", 8, "int64"),
        _dtype("F64", 8, "float64"),
        _dtype("F8_E8M0", 1, "float8_e8m0fnu"),
        _dtype("F4", 1, "float4_e2m1fn_x2", num_packed=2),
    )
})  # fmt: skip


def bits_dtype(code: str) -> np.dtype[np.unsignedinteger[Any]]:
    """Returns the unsigned integer dtype that holds one element's bits."""
    return DTYPES[code].bits


def signed_dtype(code: str) -> np.dtype[np.signedinteger[Any]]:
    """Returns the signed integer dtype as wide as one element."""
    return DTYPES[code].signed
