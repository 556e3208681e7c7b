"""The codec on torch tensors. This is the only module of the package `codec` that imports torch.

Comparison and ranking run on the tensors' device; only the changed elements move to the host.

Legend: N elements of a segment, K changed elements, C classes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from weightline.codec.capture import capture
from weightline.codec.pieces import NUM_CLASSES, TILE, RankedChanges, class_field
from weightline.dtypes import DTYPES, bits_dtype
from weightline.errors import InputError
from weightline.types import BitsArray, Changes, Segment

_TORCH_DTYPES: dict[str, torch.dtype] = {code: getattr(torch, dtype.torch_name) for code, dtype in DTYPES.items()}
_DTYPE_CODES = {dtype: code for code, dtype in _TORCH_DTYPES.items()}
_SIGNED = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def torch_dtype(code: str) -> torch.dtype:
    """Returns the torch dtype of a safetensors code."""
    return _TORCH_DTYPES[code]


def signed_torch_dtype(code: str) -> torch.dtype:
    """Returns the signed integer dtype of torch that is as wide as one element."""
    return _SIGNED[DTYPES[code].itemsize]


def signed_view(tensor: torch.Tensor) -> torch.Tensor:
    """Returns a contiguous tensor's bits, flat, as signed integers: torch compares and scatters those on every device.

    It is a view: writing to it writes to the tensor.
    """
    return tensor.detach().view(-1).view(_SIGNED[tensor.element_size()])


def signed_tensor(bits: BitsArray) -> torch.Tensor:
    """Returns an array of bits as a CPU tensor of signed integers that shares its memory."""
    return torch.from_numpy(bits.view(f"i{bits.itemsize}"))


def dtype_code(dtype: torch.dtype) -> str:
    """Returns the safetensors code of a torch dtype. InputError for a dtype that cannot be coded."""
    if dtype not in _DTYPE_CODES:
        raise InputError(
            f"tensors of {dtype} cannot be coded; known: {', '.join(sorted(_DTYPE_CODES.values()))}", dtype=str(dtype)
        )
    return _DTYPE_CODES[dtype]


def bits_of(tensor: torch.Tensor) -> BitsArray:
    """Returns the bits of a contiguous CPU tensor, flat and without a copy: writing to the array writes to the tensor.

    Raises InputError for a tensor that is not on the CPU, not contiguous, or of a dtype that cannot be coded.
    """
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise InputError(
            "bits_of needs a contiguous tensor on the CPU: call .cpu().contiguous() first", device=str(tensor.device)
        )
    array: BitsArray = signed_view(tensor).numpy().view(bits_dtype(dtype_code(tensor.dtype)))
    return array


def capture_tensor(segment: Segment, old: torch.Tensor, new: torch.Tensor, *, ranked: bool = False) -> Changes:
    """Returns the result of `weightline.codec.capture.capture` for tensors, computed on their device.

    On the CPU the kernels of `capture` run on the tensors' own memory. On other devices torch runs tile by tile, so
    that scratch memory is bounded, and only the changed elements move to the host. Pure, safe to repeat.
    InputError when a tensor lacks the segment's number of elements or dtype, or when the tensors are on two devices.
    """
    if old.device != new.device:
        raise InputError(f"states must be on one device, not on {old.device} and {new.device}", device=str(new.device))
    old_N, new_N = flat_bits(segment, old), flat_bits(segment, new)
    if old_N.device.type == "cpu":
        return capture(segment, _as_array(segment, old_N), _as_array(segment, new_N), ranked=ranked)
    return capture_on_device(segment, old_N, new_N, ranked=ranked)


def capture_on_device(segment: Segment, old_N: torch.Tensor, new_N: torch.Tensor, *, ranked: bool) -> Changes:
    """Returns the result of `capture_tensor`, computed by torch alone, for results of `flat_bits`."""
    field = class_field(segment.tensor.dtype) if ranked else None
    tiles = [_capture_tile(old_N, new_N, start, field) for start in range(0, segment.length, TILE)]
    width = bits_dtype(segment.tensor.dtype)
    positions_K = _join([tile[0] for tile in tiles], np.dtype(np.int64))
    old_K, new_K = (_join([tile[n].view(width) for tile in tiles], width) for n in (1, 2))
    if not ranked:
        return Changes(segment, positions_K, old_K, new_K)
    ranks_K = _join([tile[3].astype(np.uint32) for tile in tiles], np.dtype(np.uint32))
    return RankedChanges(segment, positions_K, old_K, new_K, ranks_K)


def flat_bits(segment: Segment, tensor: torch.Tensor) -> torch.Tensor:
    """Returns the tensor's bits as a flat tensor of signed integers, without a copy if it is contiguous. InputError."""
    if tensor.numel() != segment.length or dtype_code(tensor.dtype) != segment.tensor.dtype:
        raise InputError(
            f"segment of {segment.tensor.name!r} needs {segment.length} elements of {segment.tensor.dtype}, "
            f"not {tensor.numel()} of {tensor.dtype}",
            tensor=segment.tensor.name,
        )
    return signed_view(tensor.reshape(-1))


def _as_array(segment: Segment, bits_N: torch.Tensor) -> BitsArray:
    return bits_N.numpy().view(bits_dtype(segment.tensor.dtype))


def _capture_tile(
    old_N: torch.Tensor, new_N: torch.Tensor, start: int, field: tuple[int, int] | None
) -> tuple[npt.NDArray[Any], ...]:
    """Returns positions, old and new bits (signed) of the tile at `start`; with a class field also ranks."""
    old, new = old_N[start : start + TILE], new_N[start : start + TILE]
    at_K = torch.nonzero(old != new).flatten()
    found = [at_K + start, old[at_K], new[at_K]]
    if field is not None:
        found.append(_rank(old, at_K, field))
    return tuple(tensor.cpu().numpy() for tensor in found)


def _rank(old: torch.Tensor, at_K: torch.Tensor, field: tuple[int, int]) -> torch.Tensor:
    """Returns the ranks of the elements `at_K` within their classes, by one stable sort."""
    shift, mask = field
    # Shifting a signed integer extends its sign. The mask removes that, since every class field is below the sign.
    kinds = ((old >> shift) & mask).to(torch.uint8)
    counts_C = torch.bincount(kinds.int(), minlength=NUM_CLASSES)
    order = torch.sort(kinds, stable=True).indices
    place = torch.empty_like(order)
    place[order] = torch.arange(order.numel(), device=order.device)
    starts_C = torch.cumsum(counts_C, 0) - counts_C
    return place[at_K] - starts_C[kinds[at_K].long()]


def _join(parts: list[npt.NDArray[Any]], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    return np.concatenate([np.zeros(0, dtype), *parts])
