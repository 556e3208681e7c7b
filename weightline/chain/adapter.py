"""What an adapter's folder says of the model that it belongs to."""

from __future__ import annotations

import json
from pathlib import Path

from weightline.chain.assets import ADAPTER_CONFIG
from weightline.chain.groups import tensor_groups
from weightline.chain.target import FileTarget
from weightline.codec.digest import format_digest, tensor_digest
from weightline.errors import BaseMismatchError, InputError
from weightline.format.manifest import AdapterBase
from weightline.types import Segment


def base_of_folder(folder: Path) -> AdapterBase | None:
    """The base model of an adapter's folder (peft). None for another folder, or when the base is no folder here.

    Reads the base's weights, once, some tensors at a time. InputError when adapter_config.json is broken.
    """
    config = folder / ADAPTER_CONFIG
    if not config.is_file():
        return None
    try:
        named = json.loads(config.read_bytes())["base_model_name_or_path"]
        base = Path(named).expanduser() if named else None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{config} is no adapter's configuration: {error!r}", path=str(config)) from error
    if base is None or not any(base.glob("*.safetensors")):
        return None
    target = FileTarget(base)
    specs, digests = target.specs, {}
    for names in tensor_groups(specs.values()):
        for name, bits_N in target.read(names).items():
            segment = Segment(specs[name], 0, specs[name].num_elements)
            digests[name] = format_digest(tensor_digest(segment, bits_N))
    return AdapterBase.of(named, digests, sum(spec.num_elements for spec in specs.values()))


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
