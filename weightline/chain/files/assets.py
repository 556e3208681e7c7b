"""The small files that make weights a loadable model: config, generation config, tokenizer. Stored by content."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

from weightline.errors import InputError
from weightline.format import keys
from weightline.format.envelope import sha256_of
from weightline.format.manifest import AssetRef
from weightline.store import Store

_MAX_ASSET_NBYTES = 64 * 1024 * 1024
#: What transformers keeps beside weights. A folder's other files (optimizer states, logs) are nobody's asset.
_SUFFIXES = frozenset({".json", ".jinja", ".model", ".txt", ".tiktoken", ".py"})
_FOREIGN_NAMES = frozenset({"weightline.json", "trainer_state.json"})
#: Says where another checkpoint's weights lie: a pulled one has shards of its own.
_INDEX_SUFFIX = ".index.json"
_logger = logging.getLogger(__name__)
#: The file that makes a folder an adapter's (peft).
ADAPTER_CONFIG = "adapter_config.json"


def upload_files(store: Store, folder: Path, held: Iterable[AssetRef] = ()) -> tuple[AssetRef, ...]:
    """Put the folder's model files, each under the name of its content. Safe to repeat.

    `held`: those that a kept version of this chain names, so that gc leaves them alone: they are not put again.
    """
    return tuple(upload_file(store, path, held) for path in sorted(folder.iterdir()) if _is_asset(path))


def upload_file(store: Store, path: Path, held: Iterable[AssetRef] = ()) -> AssetRef:
    """Put one file, as `upload_files` does. InputError for a name that no manifest may have.

    Put again although it is there, if no kept version names it: gc could take an old object at any moment until the
    commit. Not create-only, which may be slow: whoever writes this key writes these bytes.
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
        _logger.warning(
            "%s is left out: the files of a version have plain names (letters, digits, '.', '_', '-')", path
        )
        return False
    return True
