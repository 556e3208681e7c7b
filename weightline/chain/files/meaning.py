"""Compares small files of a model by their meaning, without the keys that differ between machines for no reason.

Libraries write into their JSON files from where and with which options the files were loaded. Two files that differ in
such keys alone, in the order of keys or in their spelling of numbers are the same file to every loader.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import Any

from cachetools import LRUCache, cached

from weightline.chain.files.small_files import MAX_ASSET_NBYTES
from weightline.chain.replay.fetch import fetching
from weightline.format.manifest import AssetRef
from weightline.store import Store

#: How something was loaded. No loader reads these keys, so they are not written.
_UNWRITTEN = frozenset({
    "_name_or_path", "name_or_path", "_commit_hash", "_from_auto", "_from_pipeline", "_original_object_hash",
    "local_files_only", "is_local", "cache_dir", "force_download", "resume_download", "proxies", "use_auth_token",
})  # fmt: skip

#: Which release wrote the file. Some loaders read these keys, so they are written, and never make two files differ.
_UNCOMPARED = frozenset({"transformers_version", "__version__", "_from_model_config", "_diffusers_version"})

#: More keys of an adapter's configuration: where its base model lay. The manifest names the base model by its bits.
_UNCOMPARED_OF_ADAPTERS = frozenset({"base_model_name_or_path", "revision", "peft_version"})

#: What the last call of a tokenizer left behind; every call of transformers sets it anew.
_UNCOMPARED_OF_TOKENIZERS = frozenset({"truncation", "padding"})

#: Keys that say the same under two names.
_RENAMED = {"torch_dtype": "dtype"}

#: Lists without an order: peft writes sets.
_SETS = frozenset({"target_modules", "modules_to_save", "exclude_modules", "layers_to_transform"})

#: Names of labels, which may be any words.
_OPAQUE = frozenset({"id2label", "label2id"})


def without_local_keys(name: str, raw: bytes) -> bytes:
    """Returns the file as it is written into a chain: without the keys that say how it was loaded. Pure."""
    document = _parsed(raw) if _is_config(name) else None
    try:
        if document is None or not _has_key(document, _UNWRITTEN):
            return raw
        text = json.dumps(_without(document, _UNWRITTEN), indent=2, ensure_ascii=False)
        return f"{text}\n".encode()
    except (RecursionError, UnicodeEncodeError):
        return raw


def meaning_of(name: str, raw: bytes) -> str:
    """Returns a hash that two files share when a loader cannot tell them apart. Pure."""
    document = _parsed(raw) if _is_compared_by_meaning(name, len(raw)) else None
    try:
        text = raw if document is None else json.dumps(_comparable(name, document), sort_keys=True).encode()
    except RecursionError:
        text = raw
    return hashlib.sha256(text).hexdigest()


def _comparable(name: str, document: dict[str, Any]) -> Any:
    """Returns the part of a file that is compared, in one spelling."""
    basename = PurePosixPath(name).name
    if basename == "tokenizer.json":
        return {key: value for key, value in document.items() if key not in _UNCOMPARED_OF_TOKENIZERS}
    is_adapters = basename == "adapter_config.json"
    ignored = _UNWRITTEN | _UNCOMPARED | (_UNCOMPARED_OF_ADAPTERS if is_adapters else frozenset())
    return _canonical(_without(document, ignored))


def meaning_of_asset(store: Store, asset: AssetRef) -> str:
    """Returns `meaning_of` an asset, which this process fetches once, and only if its sha256 is not its meaning."""
    return _fetched_meaning(store, asset) if _is_compared_by_meaning(asset.name, asset.nbytes) else asset.sha256


@cached(LRUCache(4096), key=lambda _, asset: (asset.name, asset.sha256), lock=threading.Lock())
def _fetched_meaning(store: Store, asset: AssetRef) -> str:
    with fetching(store) as fetcher:
        return meaning_of(asset.name, fetcher.fetch(asset).read_bytes())


def have_same_meaning(store: Store, one: Iterable[AssetRef], other: Iterable[AssetRef]) -> bool:
    """Returns whether two versions have the same small files for every loader. Texts for people may differ."""
    ours, theirs = ({asset.name: asset for asset in assets if not _is_prose(asset.name)} for assets in (one, other))
    if ours.keys() != theirs.keys():
        return False
    return all(
        ours[name].sha256 == theirs[name].sha256
        or meaning_of_asset(store, ours[name]) == meaning_of_asset(store, theirs[name])
        for name in ours
    )


def _is_config(name: str) -> bool:
    return fnmatchcase(PurePosixPath(name).name, "*config*.json")


def _is_compared_by_meaning(name: str, nbytes: int) -> bool:
    has_meaning = _is_config(name) or PurePosixPath(name).name in ("tokenizer.json", "special_tokens_map.json")
    return has_meaning and nbytes <= MAX_ASSET_NBYTES


def _is_prose(name: str) -> bool:
    basename = PurePosixPath(name).name
    return basename.endswith(".md") or basename.startswith(("README", "LICENSE", "LICENCE", "NOTICE"))


def _parsed(raw: bytes) -> dict[str, Any] | None:
    try:
        document = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    return document if isinstance(document, dict) else None


def _has_key(value: Any, keys: frozenset[str]) -> bool:
    if isinstance(value, dict):
        return any(key in keys or (key not in _OPAQUE and _has_key(inner, keys)) for key, inner in value.items())
    return isinstance(value, list) and any(_has_key(inner, keys) for inner in value)


def _without(value: Any, keys: frozenset[str]) -> Any:
    if isinstance(value, dict):
        return {
            key: inner if key in _OPAQUE else _without(inner, keys) for key, inner in value.items() if key not in keys
        }
    return [_without(inner, keys) for inner in value] if isinstance(value, list) else value


def _canonical(value: Any) -> Any:
    """Returns the value with one spelling for each thing that JSON or the libraries can spell in several ways."""
    if isinstance(value, dict):
        found = {_RENAMED.get(key, key): _canonical(inner) for key, inner in value.items()}
        return {key: _as_set(inner) if key in _SETS else inner for key, inner in found.items()}
    if isinstance(value, list):
        return [_canonical(inner) for inner in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _as_set(value: Any) -> Any:
    return sorted(value, key=str) if isinstance(value, list) else value
