"""Splits a PeftModel into its adapter, which the chain holds, and its base model, which the manifests name.

The adapter consists of the tensors that peft's own `save_pretrained` would write, under the same names. The base model
is identified by its bits: one hash over its tensors' digests, under the names of the base model's own checkpoint. So
the hash depends neither on the adapter nor on how ranks partition the model.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from weightline.chain.files.weight_files import ADAPTER_CONFIG
from weightline.codec.digest import format_digest
from weightline.errors import InputError
from weightline.format.manifest import AdapterBase
from weightline.naming import CheckpointTensor, as_saved, spec_of, without_wrappers


@dataclass(frozen=True, slots=True)
class AdapterParts:
    """The two halves of a PeftModel."""

    adapter: tuple[CheckpointTensor, ...]
    base: tuple[CheckpointTensor, ...]
    """The frozen tensors, as the base model's own checkpoint has them."""


def is_peft_model(model: Any) -> bool:
    """Returns whether peft wrapped the model.

    Raises InputError for adapter layers without a PeftModel around them, however they were put into the model: by
    transformers' `add_adapter`, or by peft's `inject_adapter_in_model`.
    """
    peft = sys.modules.get("peft")
    if peft is None:
        return False
    if isinstance(model, peft.PeftModel):
        return True
    if any(isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer) for module in model.modules()):
        raise InputError(
            "the model holds an adapter without a PeftModel around it: wrap the model with peft.get_peft_model instead "
            "of model.add_adapter"
        )
    return False


def adapter_names(model: Any) -> dict[str, str]:
    """Returns, for the active adapter: name in adapter_model.safetensors -> name in the model. Reads no weights.

    peft may look up the base model's config on the Hub, so call this on rank 0 and broadcast the result. InputError for
    an adapter whose saved tensors are computed on saving instead of held by the model.
    """
    from peft import get_peft_model_state_dict

    name = _active_adapter(model)
    held = _held_tensors(model)
    name_of: dict[int, str] = {}
    for internal, tensor in held.items():
        name_of.setdefault(id(tensor), internal)
    with _peft_unwarned():
        saved = get_peft_model_state_dict(model, state_dict=dict(held), adapter_name=name)
    computed = next((published for published, tensor in saved.items() if id(tensor) not in name_of), None)
    if computed is not None:
        raise InputError(
            f"peft computes {computed} when it saves a {type(model.peft_config[name]).__name__}: weightline publishes "
            "only adapters that hold every tensor that they save",
            tensor=computed,
        )
    return {without_wrappers(published): name_of[id(tensor)] for published, tensor in saved.items()}


def adapter_parts(model: Any, names: Mapping[str, str]) -> AdapterParts:
    """Returns the adapter's tensors under their published names, and the frozen tensors of the base model.

    InputError when a tensor outside the adapter is trained, and when the model does not hold the adapter.
    """
    held = _held_tensors(model)
    missing = next((name for name, internal in names.items() if internal not in held), None)
    if missing is not None:
        raise InputError(
            f"the model no longer holds the adapter's tensor {missing} (was the adapter merged or removed?): publish "
            "what comes after as a chain of its own",
            tensor=missing,
        )
    adapter = tuple(CheckpointTensor(spec_of(name, held[internal]), held[internal]) for name, internal in names.items())
    in_adapter = {id(held[internal]) for internal in names.values()}
    base: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in _base_tensors(model.get_base_model()):
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        if not tensor.requires_grad:
            base[name] = tensor
        elif id(tensor) not in in_adapter:
            raise InputError(
                f"{name} is trained, but peft does not save it with the adapter: freeze it, or name it in "
                "modules_to_save",
                tensor=name,
            )
    return AdapterParts(adapter, as_saved(model.get_base_model(), base))


def base_model_of(model: Any, parts: AdapterParts, digests: Mapping[str, int]) -> AdapterBase:
    """Returns the base model as manifests record it. `digests`: the state digest of each of its tensors."""
    return AdapterBase.of(
        model.peft_config[_active_adapter(model)].base_model_name_or_path or "",
        {name: format_digest(digest) for name, digest in digests.items()},
        sum(published.spec.num_elements for published in parts.base),
    )


def save_adapter_config(model: Any, folder: Path) -> None:
    """Writes adapter_config.json as peft's save_pretrained does, without reading weights."""
    name = _active_adapter(model)
    empty = {internal: torch.empty(0) for internal in _held_tensors(model)}
    with tempfile.TemporaryDirectory(prefix="weightline-adapter-") as scratch, _peft_unwarned():
        model.save_pretrained(scratch, state_dict=empty, selected_adapters=[name])
        found = next(Path(scratch).rglob(ADAPTER_CONFIG))
        (folder / ADAPTER_CONFIG).write_bytes(found.read_bytes())


@contextmanager
def _peft_unwarned() -> Iterator[None]:
    """Suppresses peft's warnings about saving, since the trainer's own save shows them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


def _active_adapter(model: Any) -> str:
    active: list[str] = list(model.active_adapters)
    if len(active) != 1 or model.peft_config[active[0]].is_prompt_learning:
        raise InputError(
            f"the active adapters are {', '.join(active) or 'none'}: activate exactly one that is no soft prompt",
            adapters=active,
        )
    return active[0]


def _held_tensors(model: Any) -> dict[str, torch.Tensor]:
    """Returns the tensors that training holds, partitioned or not, by the names of the model's state dict."""
    state = model.state_dict(keep_vars=True)
    return {name: tensor for name, tensor in state.items() if isinstance(tensor, torch.Tensor)}


def _base_tensors(module: torch.nn.Module, path: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the parameters and persistent buffers of the base model, by the names that it has for them without peft.

    Names do not tell them from those of an adapter, which may be called like a module of the model. Modules do: of each
    one that peft put around a module of the model, only the wrapped module belongs to the base.
    """
    wrapped = _wrapped_by_peft(module)
    if wrapped is not None:
        yield from _base_tensors(wrapped, path)
        return
    buffers = (item for item in module._buffers.items() if item[0] not in module._non_persistent_buffers_set)
    for name, tensor in (*module._parameters.items(), *buffers):
        if tensor is not None:
            yield without_wrappers(path + name), tensor
    for name, child in module._modules.items():
        if child is not None:
            yield from _base_tensors(child, f"{path}{name}.")


def _wrapped_by_peft(module: torch.nn.Module) -> torch.nn.Module | None:
    """Returns the module of the base model that this module of peft's stands for; None for a module of the model."""
    from peft.tuners.adaption_prompt.layer import _BaseAdaptedAttention
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    wrapped: torch.nn.Module | None = None
    if isinstance(module, BaseTunerLayer):
        wrapped = module.base_layer
    elif isinstance(module, AuxiliaryTrainingWrapper):
        wrapped = module.original_module
    elif isinstance(module, _BaseAdaptedAttention):
        wrapped = module.model
    return wrapped
