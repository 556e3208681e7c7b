"""Stores the small files beside the weights: config, generation config and tokenizer. Finds an adapter's base model.

Assets are keyed by content, so a file that several versions share is stored once.
"""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from weightline.chain.files.meaning import meaning_of, meaning_of_asset, without_local_keys
from weightline.chain.files.small_files import find_small_files
from weightline.chain.files.source import FolderSource
from weightline.chain.files.weight_files import ADAPTER_CONFIG, is_file_there
from weightline.chain.read.history import Chain
from weightline.chain.replay.diff import tensor_groups
from weightline.chain.replay.fetch import Fetcher
from weightline.codec.digest import format_digest, tensor_digest
from weightline.errors import BaseMismatchError, DigestMismatchError, InputError, NotFoundError
from weightline.files import copy_file, sha256_of, user_path
from weightline.format import keys
from weightline.format.header import HeaderV2
from weightline.format.manifest import AdapterBase, AssetRef, Header, HeaderV1
from weightline.store import Store
from weightline.types import Segment

#: In format 1, a trainer names the assets again in every so-many-th version, so that no reader looks further back.
ASSETS_EVERY = 64

_logger = logging.getLogger(__name__)


def upload_files(
    store: Store,
    folder: Path,
    held: Iterable[AssetRef] = (),
    *,
    weights: frozenset[str] = frozenset(),
    is_saved: bool = False,
) -> tuple[AssetRef, ...]:
    """Uploads the folder's small files, each under a key made from its content. Safe to repeat.

    Files that `find_small_files` leaves out are named in one line of the log. A file with the meaning of the asset of
    its name in `held` becomes that asset.

    Args:
        store: The chain's bucket.
        folder: The checkpoint folder.
        held: Assets that a kept version of this chain names. gc does not collect them, so they are not uploaded again.
        weights: As for `find_small_files`.
        is_saved: As for `find_small_files`.
    """
    found = find_small_files(folder, weights=weights, is_saved=is_saved)
    if found.left_out:
        _logger.warning("%s: left out of the version: %s", folder, ", ".join(found.left_out))
    held_by_name = {asset.name: asset for asset in held}
    return tuple(_upload(store, folder / name, name, held_by_name) for name in found.taken)


def _upload(store: Store, path: Path, name: str, held: Mapping[str, AssetRef]) -> AssetRef:
    """Uploads one file without the keys that say how it was loaded, unless `held` has one of the same meaning."""
    raw = path.read_bytes()
    written = without_local_keys(name, raw)
    known = held.get(name)
    if known is not None and _is_known(store, known, raw, written):
        return known
    if written == raw:
        return upload_file(store, path, held.values(), name=name)
    with tempfile.TemporaryDirectory(prefix="weightline-") as scratch:
        normalized = Path(scratch) / path.name
        normalized.write_bytes(written)
        return upload_file(store, normalized, held.values(), name=name)


def _is_known(store: Store, known: AssetRef, raw: bytes, written: bytes) -> bool:
    """Returns whether the asset and these bytes mean the same. Fetches the asset when hashes do not answer that."""
    if known.sha256 in {hashlib.sha256(text).hexdigest() for text in {raw, written}}:
        return True
    try:
        return meaning_of_asset(store, known) == meaning_of(known.name, raw)
    except (NotFoundError, DigestMismatchError) as error:
        _logger.warning("the chain's %s cannot be read and is written again: %s", known.name, error)
        return False


def upload_file(store: Store, path: Path, held: Iterable[AssetRef] = (), *, name: str) -> AssetRef:
    """Uploads one file as the asset `name`, byte for byte. InputError for a name that no manifest may contain.

    An existing object that no kept version names is uploaded again, which renews its age: gc could otherwise delete it
    before the commit. The put is not create-only, which may be slow, since every writer of this key writes these bytes.
    """
    sha256 = sha256_of(path)
    ref = AssetRef(key=keys.asset(sha256), nbytes=path.stat().st_size, sha256=sha256, name=keys.checked_path(name))
    if ref.key not in {one.key for one in held}:
        store.put_file(ref.key, path)
    return ref


def assets_of(chain: Chain, version: int) -> tuple[AssetRef, ...]:
    """Returns the assets of a version.

    A header names their list. In format 1 they are those of the newest manifest up to the version that names any:
    manifests are read from the version backwards, one at a time. One that is collected meanwhile is passed over: gc
    leaves the manifest that names the assets of a kept version. A version after one that was looked up before costs at
    most its own manifest, and no listing.
    """
    header = _header_if_there(chain, version)
    if isinstance(header, HeaderV2):
        return _listed(chain, header)
    assets = chain.assets.get(version) or _assets_beside(chain, version)
    if assets:
        chain.assets[version] = assets
        return assets
    for candidate in _backwards(chain, version):
        assets = chain.assets.get(candidate) or _own_assets(chain, candidate)
        if assets:
            break
    chain.assets[version] = assets
    return assets


def _header_if_there(chain: Chain, version: int) -> Header | None:
    try:
        return chain.read_header(version)
    except NotFoundError:
        return None


def _listed(chain: Chain, header: HeaderV2) -> tuple[AssetRef, ...]:
    return chain.contents.assets(header.assets) if header.assets else ()


def _own_assets(chain: Chain, version: int) -> tuple[AssetRef, ...]:
    """Returns the assets that the version's own header names; nothing for a version that is gone."""
    header = _header_if_there(chain, version)
    if isinstance(header, HeaderV2):
        return _listed(chain, header)
    return header.assets if isinstance(header, HeaderV1) else ()


def _assets_beside(chain: Chain, version: int) -> tuple[AssetRef, ...]:
    """Returns the assets of a version if those of the version before it are known; nothing otherwise."""
    before = chain.assets.get(version - 1, ())
    return before and (_own_assets(chain, version) or before)


def _backwards(chain: Chain, version: int) -> Iterator[int]:
    """Yields the versions up to this one, newest first. Lists the 64 newest, then eight times as many, and so on."""
    last, num_versions = version, 64
    while last >= 0:
        first = max(0, last - num_versions + 1)
        yield from reversed(chain.versions(first, last))
        last, num_versions = first - 1, 8 * num_versions


def write_assets(assets: Sequence[AssetRef], folder: Path, fetcher: Fetcher) -> None:
    """Writes the assets into a folder, each at its path. Replaces files that are there."""
    fetcher.prefetch(assets)
    for asset in assets:
        copy_file(fetcher.fetch(asset), folder / asset.name)


def is_adapter(folder: Path) -> bool:
    """Returns whether the folder has an adapter's configuration file (peft)."""
    return is_file_there(folder / ADAPTER_CONFIG)


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
    places = (user_path(named), folder / named) if named else ()
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
