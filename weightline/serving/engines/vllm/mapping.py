"""The mapping from the elements of a checkpoint's tensors to an engine's fused, sharded, padded parameters.

It is determined once per load by the engine's own loader: the loader receives stand-ins without data, and a dispatch
mode below the Python API records every write to a parameter without executing it. A write that is a plain copy of a
view of the stand-in shows exactly which elements go where; any other write is refused with the tensor's name.

Then the boxes that all workers found are assigned: of equal boxes (replicas, copies) the first is assigned to its
worker, and every element of every tensor must be in exactly one assigned box.

Legend: N elements of a tensor, K some of them. A position is a flat (row-major) index in the checkpoint's tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from weightline.codec.torch_ops import dtype_code, signed_torch_dtype, torch_dtype
from weightline.errors import ApplyError
from weightline.types import Segment, TensorSpec

LoadWeights = Callable[[Iterable[tuple[str, torch.Tensor]]], Any]

#: Writes by which loaders pad parameters. They copy no element of the checkpoint.
_PADDING_OPS = frozenset({"aten::fill_", "aten::zero_"})
#: Attributes in which modules keep requests' state, not weights.
_CACHES = frozenset({"kv_cache"})


@dataclass(frozen=True, slots=True, order=True)
class Box:
    """The positions `offset + i * strides[0] + j * strides[1] ..` for i, j, .. within `shape`; strides fall.

    A slice of rows, of columns, or one expert of many: the part of a tensor that a loader narrows it to.
    """

    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        return prod(self.shape)

    def checked(self, spec: TensorSpec) -> Box:
        """Returns itself. ApplyError unless it lies within the tensor and every position in it has one index."""
        below = 0
        for size, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if stride <= below:
                raise ApplyError(f"the engine's loader cuts {spec.name} into parts that are no boxes", tensor=spec.name)
            below += (size - 1) * stride
        if self.offset < 0 or self.offset + below >= spec.num_elements:
            raise ApplyError(f"the engine's loader reads beyond the end of {spec}", tensor=spec.name)
        return self

    def runs(self, spec: TensorSpec) -> Iterator[Segment]:
        """Yields the box as stretches of consecutive positions, in row-major order of the box."""
        length, axes = 1, len(self.shape)
        while axes and self.strides[axes - 1] == length:
            length *= self.shape[axes - 1]
            axes -= 1
        for index in np.ndindex(self.shape[:axes]):
            start = self.offset + sum(i * stride for i, stride in zip(index, self.strides, strict=False))
            yield Segment(spec, start, length)

    def within(self, whole_N: np.ndarray[Any, np.dtype[Any]]) -> np.ndarray[Any, np.dtype[Any]]:
        """Returns the view of a whole tensor's flat array that the box covers."""
        strides = [stride * whole_N.itemsize for stride in self.strides]
        return np.lib.stride_tricks.as_strided(whole_N[self.offset :], self.shape, strides)

    def to_json(self) -> list[object]:
        return [self.offset, list(self.shape), list(self.strides)]


def box_from_json(raw: Sequence[Any]) -> Box:
    """Inverts `Box.to_json`."""
    offset, shape, strides = raw
    return Box(int(offset), tuple(int(n) for n in shape), tuple(int(n) for n in strides))


Assignment = dict[str, list[int]]
"""By tensor, the numbers of the boxes that are assigned to one rank."""


def assign_boxes(specs: Mapping[str, TensorSpec], held: Sequence[Mapping[str, Sequence[Box]]]) -> list[Assignment]:
    """Returns every rank's assignment: of equal boxes (replicas, copies) the first, in order of ranks.

    ApplyError unless, of every tensor, each element is in exactly one assigned box.
    """
    assigned: list[Assignment] = [{} for _ in held]
    for name, spec in specs.items():
        chosen: set[Box] = set()
        for rank, boxes_of in enumerate(held):
            for number, box in enumerate(boxes_of.get(name, ())):
                if box not in chosen:
                    chosen.add(box)
                    assigned[rank].setdefault(name, []).append(number)
        _require_each_once(spec, chosen)
    return assigned


def _require_each_once(spec: TensorSpec, boxes: set[Box]) -> None:
    if not boxes and spec.num_elements:
        raise ApplyError(f"the engine holds no part of {spec}: a refresh of it would be lost", tensor=spec.name)
    if len(boxes) == 1 and next(iter(boxes)).num_elements == spec.num_elements:
        return  # the only box covers each position once: it lies within the tensor and has as many elements
    counts_N = np.zeros(spec.num_elements, np.uint8)
    for box in boxes:
        counts = box.within(counts_N)
        counts += 1
    if not (counts_N == 1).all():
        position = int((counts_N != 1).argmax())
        raise ApplyError(
            f"element {position} of {spec.name} is in {counts_N[position]} places of the engine that do not agree on "
            "its part: it cannot be refreshed in place",
            tensor=spec.name, position=position,
        )  # fmt: skip


def is_each_held_once(specs: Mapping[str, TensorSpec], held: Sequence[Mapping[str, Sequence[Box]]]) -> bool:
    """Returns whether each tensor lies in the memory of one rank alone, which then can decode its changes by itself."""
    return all(sum(bool(boxes_of.get(name)) for boxes_of in held) <= 1 for name in specs)


@dataclass(frozen=True, slots=True, eq=False)
class PlacedBox:
    """One box of a tensor's elements and the memory that holds it.

    `flat` is all of the parameter's storage as signed integers; the box's element (i, j, ..) is at
    `offset + i * strides[0] + j * strides[1] ..` of it.
    """

    box: Box
    flat: torch.Tensor
    offset: int
    strides: tuple[int, ...]

    def view(self) -> torch.Tensor:
        """Returns the box's elements, in place."""
        return self.flat.as_strided(self.box.shape, self.strides, self.offset)

    def is_whole(self, spec: TensorSpec) -> bool:
        """Returns whether all elements of the tensor lie in the memory one after the other, in its own order."""
        return self.box.num_elements == spec.num_elements and self.strides == self.box.strides == _row_major_strides(
            self.box.shape
        )

    def locate(self, positions_K: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns (mask of the positions that are in the box, their indices in `flat`). Pure."""
        rest_K = positions_K - self.box.offset
        found_K = rest_K >= 0
        at_K = torch.full_like(rest_K, self.offset)
        for size, source_stride, stride in zip(self.box.shape, self.box.strides, self.strides, strict=True):
            index_K = rest_K if source_stride == 1 else torch.div(rest_K, source_stride, rounding_mode="floor")
            found_K &= index_K < size
            at_K += index_K * stride
            rest_K = rest_K - index_K * source_stride
        found_K &= rest_K == 0
        return found_K, at_K[found_K]


def _row_major_strides(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(prod(shape[axis + 1 :]) for axis in range(len(shape)))


Placement = dict[str, tuple[PlacedBox, ...]]


def learn_placement(model: torch.nn.Module, specs: Mapping[str, TensorSpec]) -> Placement:
    """Returns the boxes of every tensor in this worker's memory, found by `model.load_weights`.

    A tensor that this worker does not hold has no box. Writes nothing to the model. ApplyError names a tensor, or a
    parameter, that cannot be refreshed in place.
    """
    load_weights: LoadWeights | None = getattr(model, "load_weights", None)
    if load_weights is None:
        raise ApplyError(f"{type(model).__name__} has no load_weights: its parameters cannot be mapped")
    parameters = _names_by_storage(model)
    require_unpacked(model)
    _require_nothing_derived(model, parameters)
    placement: Placement = {}
    for name, spec in specs.items():
        stand_in = torch.empty(spec.shape, dtype=torch_dtype(spec.dtype))
        watch = _WatchWrites(spec, stand_in, parameters)
        try:
            with torch.no_grad(), watch:
                load_weights([(name, stand_in)])
        except ApplyError:
            raise
        except Exception as error:
            # The loader is the engine's code: any error that it raises means that the tensor does not fit.
            raise ApplyError(f"the engine's loader refuses {spec}: {error!r}", tensor=name) from error
        placement[name] = tuple(watch.boxes)
    if _names_by_storage(model).keys() != parameters.keys():
        raise ApplyError("the engine's loader replaces parameters instead of filling them: it cannot be mapped")
    _require_filled(model, placement)
    return placement


def require_unpacked(model: torch.nn.Module) -> None:
    """Raises ApplyError for a CPU linear that computes from a copy of its weight, which writes to the weight miss."""
    for name, module in model.named_modules():
        linear = getattr(module, "cpu_linear", torch.nn.functional.linear)
        if linear is not torch.nn.functional.linear:
            raise ApplyError(
                f"{name} computes from a packed copy of its weight. Start vLLM with "
                "--worker-extension-cls weightline.serving.engines.vllm.worker.WeightlineWorker",
                layer=name,
            )


def _require_nothing_derived(model: torch.nn.Module, parameters: Mapping[int, str]) -> None:
    """Raises ApplyError for a module with a matrix beside its parameters, which it may have computed from them."""
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            is_matrix = isinstance(value, torch.Tensor) and value.is_floating_point() and value.ndim > 1
            if is_matrix and attribute not in _CACHES and value.numel() and _storage_id(value) not in parameters:
                raise ApplyError(
                    f"the engine keeps {name}.{attribute} {tuple(value.shape)} beside its parameters: weights that it "
                    "computed from the checkpoint's would not follow a refresh",
                    layer=name, attribute=attribute,
                )  # fmt: skip


def _names_by_storage(model: torch.nn.Module) -> dict[int, str]:
    """Returns the name of the parameter or buffer in each storage; of tied ones the first name."""
    found: dict[int, str] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        found.setdefault(_storage_id(tensor), name)
    return found


def _storage_id(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


class _WatchWrites(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Intercepts every operator of a load. Records copies into the model's parameters instead of executing them."""

    def __init__(self, spec: TensorSpec, stand_in: torch.Tensor, parameters: Mapping[int, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.boxes: list[PlacedBox] = []
        self._spec, self._parameters, self._source = spec, parameters, _storage_id(stand_in)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        schema = func._schema
        for argument, value in zip(schema.arguments, args, strict=False):
            is_written = argument.alias_info is not None and argument.alias_info.is_write
            if is_written and isinstance(value, torch.Tensor) and _storage_id(value) in self._parameters:
                self._record_write(schema.name, value, args)
                return value
        return func(*args, **(kwargs or {}))

    def _record_write(self, operator: str, target: torch.Tensor, args: tuple[Any, ...]) -> None:
        if operator in _PADDING_OPS:
            return
        parameter = self._parameters[_storage_id(target)]
        source = args[1] if operator == "aten::copy_" else None
        if source is None or _storage_id(source) != self._source:
            raise ApplyError(
                f"the engine computes {parameter} from {self._spec.name} ({operator}) instead of copying it: "
                "it cannot be refreshed in place",
                tensor=self._spec.name, parameter=parameter,
            )  # fmt: skip
        if dtype_code(target.dtype) != self._spec.dtype:
            raise ApplyError(
                f"the engine holds {self._spec.name} as {dtype_code(target.dtype)}, the chain as {self._spec.dtype}: "
                "start it with the chain's dtype (vLLM: --dtype)",
                tensor=self._spec.name, parameter=parameter,
            )  # fmt: skip
        self.boxes.append(_placed_box(self._spec, parameter, target, source))


def _placed_box(spec: TensorSpec, parameter: str, target: torch.Tensor, source: torch.Tensor) -> PlacedBox:
    """Returns the box of a copy's two views. Without their dimensions of size 1 they must be of one shape."""
    dims = [(size, stride) for size, stride in zip(source.shape, source.stride(), strict=True) if size != 1]
    into = [(size, stride) for size, stride in zip(target.shape, target.stride(), strict=True) if size != 1]
    shape = tuple(size for size, _ in dims)
    if shape != tuple(size for size, _ in into):
        raise ApplyError(
            f"the engine spreads {spec.name} {tuple(source.shape)} over {parameter} {tuple(target.shape)}: "
            "it cannot be refreshed in place",
            tensor=spec.name, parameter=parameter,
        )  # fmt: skip
    # Largest source stride first, so that an index takes one division per dimension.
    order = sorted(range(len(shape)), key=lambda axis: -dims[axis][1])
    box = Box(
        int(source.storage_offset()), tuple(shape[axis] for axis in order), tuple(dims[axis][1] for axis in order)
    ).checked(spec)
    flat = torch.empty(0, dtype=signed_torch_dtype(spec.dtype), device=target.device)
    flat.set_(target.untyped_storage())
    return PlacedBox(box, flat, int(target.storage_offset()), tuple(into[axis][1] for axis in order))


def _require_filled(model: torch.nn.Module, placement: Placement) -> None:
    """Raises ApplyError for a parameter that no tensor fills, and for memory that two elements share."""
    taken_by: dict[int, torch.Tensor] = {}
    for name, boxes in placement.items():
        for placed in boxes:
            storage = _storage_id(placed.flat)
            if storage not in taken_by:
                taken_by[storage] = torch.zeros(placed.flat.numel(), dtype=torch.bool)
            taken = taken_by[storage].as_strided(placed.box.shape, placed.strides, placed.offset)
            if bool(taken.any()):
                raise ApplyError(f"{name} shares memory with another tensor of the chain (tied?)", tensor=name)
            taken.fill_(True)
    for name, parameter in model.named_parameters():
        if _storage_id(parameter) not in taken_by:
            raise ApplyError(
                f"no tensor of the chain fills the engine's {name} {tuple(parameter.shape)}: is it packed, derived, or "
                "of another model?",
                parameter=name,
            )
