"""Stores the small files beside the weights: config, generation config and tokenizer. Finds an adapter's base model.

Assets are keyed by content, so a file that several versions share is stored once.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from pathlib import Path

from weightline.chain.files.source import FolderSource
from weightline.chain.files.weight_files import ADAPTER_CONFIG
from weightline.chain.read.history import Chain
from weightline.chain.replay.diff import tensor_groups
from weightline.codec.digest import format_digest, tensor_digest
from weightline.errors import BaseMismatchError, InputError
from weightline.files import sha256_of
from weightline.format import keys
from weightline.format.manifest import AdapterBase, AssetRef
from weightline.store import Store
from weightline.types import Segment

_MAX_ASSET_NBYTES = 64 * 1024 * 1024

#: Suffixes of the files that transformers keeps beside weights. Other files (optimizer states, logs) are no assets.
_SUFFIXES = frozenset({".json", ".jinja", ".model", ".txt", ".tiktoken", ".py"})

_FOREIGN_NAMES = frozenset({"weightline.json", "trainer_state.json"})

#: The index of a checkpoint's shards. It is no asset, since a pulled checkpoint has shards of its own.
_INDEX_SUFFIX = ".index.json"

_logger = logging.getLogger(__name__)


def upload_files(store: Store, folder: Path, held: Iterable[AssetRef] = ()) -> tuple[AssetRef, ...]:
    """Uploads the folder's model files, each under a key made from its content. Safe to repeat.

    `held`: assets that a kept version of this chain names. gc does not collect them, so they are not uploaded again.
    """
    return tuple(upload_file(store, path, held) for path in sorted(folder.iterdir()) if _is_asset(path))


def upload_file(store: Store, path: Path, held: Iterable[AssetRef] = ()) -> AssetRef:
    """Uploads one file, as `upload_files` does. InputError for a name that no manifest may contain.

    An existing object that no kept version names is uploaded again, which renews its age: gc could otherwise delete it
    before the commit. The put is not create-only, which may be slow, since every writer of this key writes these bytes.
    """
    keys.checked_name(path.name)
    sha256 = sha256_of(path)
    ref = AssetRef(key=keys.asset(sha256), nbytes=path.stat().st_size, sha256=sha256, name=path.name)
    if ref.key not in {one.key for one in held}:
        store.put_file(ref.key, path)
    return ref


def _is_asset(path: Path) -> bool:
    if not path.is_file() or path.name in _FOREIGN_NAMES or path.name.endswith(_INDEX_SUFFIX):
        return False
    if path.suffix not in _SUFFIXES or path.stat().st_size > _MAX_ASSET_NBYTES:
        return False
    try:
        keys.checked_name(path.name)
    except InputError:
        _logger.warning("%s is left out: file names of a version are made of letters, digits, '.', '_' and '-'", path)
        return False
    return True


def assets_of(chain: Chain, version: int) -> tuple[AssetRef, ...]:
    """Returns the assets of a version: those of the newest manifest up to it that names any."""
    for candidate in reversed(chain.versions(last=version)):
        if assets := chain.manifest(candidate).assets:
            return assets
    return ()


def is_adapter(folder: Path) -> bool:
    """Returns whether the folder has an adapter's configuration file (peft)."""
    return (folder / ADAPTER_CONFIG).is_file()


def base_of_folder(folder: Path, base: Path | None = None) -> AdapterBase | None:
    """Returns the base model of an adapter's folder. None for other folders, or when this host has no such model.

    The base model is read from `base`, or from the path in adapter_config.json, relative to the working directory or
    else to the adapter's folder. Its weights are read once, a group of tensors at a time. InputError when
    adapter_config.json is broken, when `base` holds no model, and when `base` is given and `folder` is no adapter.
    """
    if not is_adapter(folder):
        if base is not None:
            raise InputError(
                f"{folder} has no {ADAPTER_CONFIG}, so it is no adapter: leave out the base model", path=str(folder)
            )
        return None
    named = _named_base(folder / ADAPTER_CONFIG)
    found = base or _base_at(folder, named)
    if found is None:
        return None
    target = FolderSource(found)
    specs, digests = target.specs, {}
    for names in tensor_groups(specs.values()):
        for name, bits_N in target.read(names).items():
            segment = Segment(specs[name], 0, specs[name].num_elements)
            digests[name] = format_digest(tensor_digest(segment, bits_N))
    return AdapterBase.of(named or str(base), digests, sum(spec.num_elements for spec in specs.values()))


def _named_base(config: Path) -> str:
    """Returns the base model's name or path from an adapter's configuration; empty when it has none. InputError."""
    try:
        named = json.loads(config.read_bytes())["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{config} is not an adapter's configuration: {error!r}", path=str(config)) from error
    if not isinstance(named, str | None):
        raise InputError(f"{config}: base_model_name_or_path is {named!r}, not a name", path=str(config))
    return named or ""


def _base_at(folder: Path, named: str) -> Path | None:
    places = (Path(named).expanduser(), folder / named) if named else ()
    return next((place for place in places if any(place.glob("*.safetensors"))), None)


def require_base(recorded: AdapterBase | None, found: AdapterBase | None, *, chain_url: str) -> AdapterBase | None:
    """Returns the base model for the next manifest: the tip's, or `found` when the tip has none.

    BaseMismatchError when both exist and differ.
    """
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
