"""What an adapter's folder says of the model that it belongs to."""

from __future__ import annotations

import json
from pathlib import Path

from weightline.chain.files.assets import ADAPTER_CONFIG
from weightline.chain.files.groups import tensor_groups
from weightline.chain.files.target import FileTarget
from weightline.codec.digest import format_digest, tensor_digest
from weightline.errors import BaseMismatchError, InputError
from weightline.format.manifest import AdapterBase
from weightline.types import Segment


def is_adapter(folder: Path) -> bool:
    """Whether the folder says that it holds an adapter (peft)."""
    return (folder / ADAPTER_CONFIG).is_file()


def base_of_folder(folder: Path, base: Path | None = None) -> AdapterBase | None:
    """The base model of an adapter's folder. None for another folder, or when no folder here holds that model.

    It lies at `base`, or where adapter_config.json says: as a path from here, else from the adapter's folder. Its
    weights are read once, some tensors at a time. InputError when adapter_config.json is broken, when `base` holds no
    model, and when there is no adapter to go with it.
    """
    if not is_adapter(folder):
        if base is not None:
            raise InputError(f"{folder} has no {ADAPTER_CONFIG}: only an adapter has a base model", path=str(folder))
        return None
    named = _named_base(folder / ADAPTER_CONFIG)
    found = base or _base_at(folder, named)
    if found is None:
        return None
    target = FileTarget(found)
    specs, digests = target.specs, {}
    for names in tensor_groups(specs.values()):
        for name, bits_N in target.read(names).items():
            segment = Segment(specs[name], 0, specs[name].num_elements)
            digests[name] = format_digest(tensor_digest(segment, bits_N))
    return AdapterBase.of(named or str(base), digests, sum(spec.num_elements for spec in specs.values()))


def _named_base(config: Path) -> str:
    """What the configuration calls the base; empty when it says nothing."""
    try:
        named = json.loads(config.read_bytes())["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{config} is no adapter's configuration: {error!r}", path=str(config)) from error
    if not isinstance(named, str | None):
        raise InputError(f"{config}: base_model_name_or_path is {named!r}, not a name", path=str(config))
    return named or ""


def _base_at(folder: Path, named: str) -> Path | None:
    places = (Path(named).expanduser(), folder / named) if named else ()
    return next((place for place in places if any(place.glob("*.safetensors"))), None)


def require_base(recorded: AdapterBase | None, found: AdapterBase | None, *, chain_url: str) -> AdapterBase | None:
    """What the next manifest says of the base: what the tip says. BaseMismatchError when another one is at hand."""
    if recorded is None or found is None:
        return recorded or found
    if (recorded.digest, recorded.num_elements) != (found.digest, found.num_elements):
        raise BaseMismatchError(
            f"the adapter in {chain_url} belongs to {recorded.name_or_path or 'a model'} (digest {recorded.digest}), "
            f"the base model at hand is {found.name_or_path or 'another one'} (digest {found.digest}). "
            "Load that base model, in the same dtype, or name a new chain",
            tensor="base_model", expected=recorded.digest, actual=found.digest,
        )  # fmt: skip
    return recorded
