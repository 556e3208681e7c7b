"""The tensors of a model that are published, found again where something has replaced them in mid-training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.distributed.tensor import DTensor

from weightline.errors import InputError
from weightline.naming import CheckpointTensor, spec_of
from weightline.types import TensorSpec

Tensors = tuple[CheckpointTensor, ...]


class LocatedTensors:
    """Published tensors of a model, with the means to notice that other objects took their place.

    An optimizer changes a parameter in place. `load_state_dict(assign=True)` and an assignment to a module's attribute
    put another object there, and the one that was found at the start keeps its old elements for ever. `model.half()`
    and an assignment to `data` keep the object, and may change its dtype and shape.
    """

    def __init__(self, model: Any, locate: Callable[[Any], Tensors]) -> None:
        """`locate` finds the tensors of a model, without any collective."""
        self._model, self._locate = model, locate
        self._watch(locate(model))

    def relocate(self, model: Any) -> Tensors | None:
        """Returns the tensors anew when one was replaced, or when `model` is another object than before, else None.

        InputError when a tensor has another name, dtype or shape than at the start.
        """
        is_same = model is self._model
        if is_same and self._watched <= self._present() and self._layouts == _layouts(self.tensors):
            return None
        specs = {tensor.spec for tensor in self.tensors}
        found = self._locate(model)
        changed = specs ^ {tensor.spec for tensor in found}
        if changed:
            names = ", ".join(sorted({spec.name for spec in changed})[:3])
            raise InputError(
                f"the model was changed in mid-training and has other tensors than before ({names}): publish what "
                "comes after as a chain of its own"
            )
        self._model = model
        self._watch(found)
        return found

    def _watch(self, found: Tensors) -> None:
        self.tensors = found
        """As they were found last."""
        # FSDP 2 itself puts gathered tensors in the place of its shards for a while, and the shards stay valid.
        own = {id(tensor.held) for tensor in found if not isinstance(tensor.held, DTensor)}
        self._watched = own & self._present()
        self._layouts = _layouts(found)

    def _present(self) -> set[int]:
        return {id(tensor) for tensor in (*self._model.parameters(), *self._model.buffers())}


def _layouts(tensors: Tensors) -> list[TensorSpec]:
    """Returns the dtypes and shapes in which training holds the tensors: once where several are parts of a held one."""
    held = {id(tensor.held): tensor for tensor in tensors}
    return [spec_of(tensor.spec.name, tensor.held) for tensor in held.values()]
