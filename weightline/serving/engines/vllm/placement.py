"""Where each element of a checkpoint's tensors lives in an engine's fused, sharded, padded parameters.

Learnt once, from the engine's own loader: it is given stand-ins that hold nothing, and every write that it would do to
a parameter is looked at below the Python API (a dispatch mode), recorded, and not done. A write that is a plain copy of
a view of the stand-in says exactly which elements go where; any other is refused by name.

Legend: N elements of a tensor, K some of them. A position is a flat (row-major) index in the checkpoint's tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from weightline.codec.torch_ops import dtype_code, signed_torch_dtype, torch_dtype
from weightline.errors import ApplyError
from weightline.serving.engines.vllm.boxes import Box
from weightline.types import TensorSpec

LoadWeights = Callable[[Iterable[tuple[str, torch.Tensor]]], Any]

#: Writes that put no checkpoint element anywhere: loaders pad with them.
_PADDING_OPS = frozenset({"aten::fill_", "aten::zero_"})
#: What modules keep of requests, not of weights.
_CACHES = frozenset({"kv_cache"})


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """One box of a tensor's elements and the memory that holds it.

    `flat` is all of the parameter's storage as signed integers; the box's element (i, j, ..) is at
    `offset + i * strides[0] + j * strides[1] ..`.
    """

    box: Box
    flat: torch.Tensor
    offset: int
    strides: tuple[int, ...]

    def view(self) -> torch.Tensor:
        """The box's elements, in place."""
        return self.flat.as_strided(self.box.shape, self.strides, self.offset)

    def locate(self, positions_K: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(which of the positions are in the box, where those are in `flat`). Pure."""
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


Placement = dict[str, tuple[Place, ...]]


def learn_placement(model: torch.nn.Module, specs: Mapping[str, TensorSpec]) -> Placement:
    """The places of every tensor, through `model.load_weights`; a tensor that is not held here has none.

    Writes nothing to the model. ApplyError names a tensor, or a parameter, that cannot be refreshed in place.
    """
    load_weights: LoadWeights | None = getattr(model, "load_weights", None)
    if load_weights is None:
        raise ApplyError(f"{type(model).__name__} has no load_weights: its parameters cannot be mapped")
    owned = _storages(model)
    _require_nothing_derived(model, owned)
    placement: Placement = {}
    for name, spec in specs.items():
        stand_in = torch.empty(spec.shape, dtype=torch_dtype(spec.dtype))
        watch = _WatchWrites(spec, stand_in, owned)
        try:
            with torch.no_grad(), watch:
                load_weights([(name, stand_in)])
        except ApplyError:
            raise
        except Exception as error:
            # A loader is the engine's code: whatever it raises means that this tensor does not fit its parameters.
            raise ApplyError(f"the engine's loader does not take {spec}: {error!r}", tensor=name) from error
        placement[name] = tuple(watch.places)
    if _storages(model).keys() != owned.keys():
        raise ApplyError("the engine's loader replaces parameters instead of filling them: it cannot be mapped")
    _require_filled(model, placement)
    return placement


def _require_nothing_derived(model: torch.nn.Module, owned: Mapping[int, str]) -> None:
    """ApplyError for a module that keeps a matrix beside its parameters: computed from them once, it would stay old."""
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            is_matrix = isinstance(value, torch.Tensor) and value.is_floating_point() and value.ndim > 1
            if is_matrix and attribute not in _CACHES and value.numel() and _storage_id(value) not in owned:
                raise ApplyError(
                    f"the engine keeps {name}.{attribute} {tuple(value.shape)} beside its parameters: weights that it "
                    "computed from the checkpoint's would not follow a refresh",
                    layer=name, attribute=attribute,
                )  # fmt: skip


def _storages(model: torch.nn.Module) -> dict[int, str]:
    """Parameter or buffer name by storage. A tied one goes by its first name."""
    found: dict[int, str] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        found.setdefault(_storage_id(tensor), name)
    return found


def _storage_id(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


class _WatchWrites(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Looks at every operator of a load. Copies into the model become places; they are not done."""

    def __init__(self, spec: TensorSpec, stand_in: torch.Tensor, owned: Mapping[int, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.places: list[Place] = []
        self._spec, self._owned, self._source = spec, owned, _storage_id(stand_in)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        schema = func._schema
        for argument, value in zip(schema.arguments, args, strict=False):
            is_written = argument.alias_info is not None and argument.alias_info.is_write
            if is_written and isinstance(value, torch.Tensor) and _storage_id(value) in self._owned:
                self._take_write(schema.name, value, args)
                return value
        return func(*args, **(kwargs or {}))

    def _take_write(self, operator: str, target: torch.Tensor, args: tuple[Any, ...]) -> None:
        if operator in _PADDING_OPS:
            return
        parameter = self._owned[_storage_id(target)]
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
        self.places.append(_place(self._spec, parameter, target, source))


def _place(spec: TensorSpec, parameter: str, target: torch.Tensor, source: torch.Tensor) -> Place:
    """The two views without their dimensions of size 1, which must then be of one shape."""
    dims = [(size, stride) for size, stride in zip(source.shape, source.stride(), strict=True) if size != 1]
    into = [(size, stride) for size, stride in zip(target.shape, target.stride(), strict=True) if size != 1]
    shape = tuple(size for size, _ in dims)
    if shape != tuple(size for size, _ in into):
        raise ApplyError(
            f"the engine spreads {spec.name} {tuple(source.shape)} over {parameter} {tuple(target.shape)}: "
            "it cannot be refreshed in place",
            tensor=spec.name, parameter=parameter,
        )  # fmt: skip
    # Largest source stride first, so that a position is taken apart by one division a dimension.
    order = sorted(range(len(shape)), key=lambda axis: -dims[axis][1])
    box = Box(
        int(source.storage_offset()), tuple(shape[axis] for axis in order), tuple(dims[axis][1] for axis in order)
    ).checked(spec)
    flat = torch.empty(0, dtype=signed_torch_dtype(spec.dtype), device=target.device)
    flat.set_(target.untyped_storage())
    return Place(box, flat, int(target.storage_offset()), tuple(into[axis][1] for axis in order))


def _require_filled(model: torch.nn.Module, placement: Placement) -> None:
    """ApplyError for a parameter that no tensor fills, and for memory that two elements would share."""
    held: dict[int, torch.Tensor] = {}
    for name, places in placement.items():
        for place in places:
            storage = _storage_id(place.flat)
            if storage not in held:
                held[storage] = torch.zeros(place.flat.numel(), dtype=torch.bool)
            taken = held[storage].as_strided(place.box.shape, place.strides, place.offset)
            if bool(taken.any()):
                raise ApplyError(f"{name} shares memory with another tensor of the chain (tied?)", tensor=name)
            taken.fill_(True)
    for name, parameter in model.named_parameters():
        if _storage_id(parameter) not in held:
            raise ApplyError(
                f"no tensor of the chain fills the engine's {name} {tuple(parameter.shape)}: is it packed, derived, or "
                "of another model?",
                parameter=name,
            )
