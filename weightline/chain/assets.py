"""The small files that make weights a loadable model: config, generation config, tokenizer. Stored by content."""

from __future__ import annotations

from pathlib import Path

from weightline.format import keys
from weightline.format.envelope import sha256_of
from weightline.format.manifest import AssetRef
from weightline.store import Store

_MAX_ASSET_NBYTES = 64 * 1024 * 1024
#: What transformers keeps beside weights. A folder's other files (optimizer states, logs) are nobody's asset.
_SUFFIXES = frozenset({".json", ".jinja", ".model", ".txt", ".tiktoken", ".py"})
_FOREIGN_NAMES = frozenset({"weightline.json", "trainer_state.json", "model.safetensors.index.json"})
#: The file that makes a folder an adapter's (peft).
ADAPTER_CONFIG = "adapter_config.json"


def upload_files(store: Store, folder: Path) -> tuple[AssetRef, ...]:
    """Put the folder's model files, each under the name of its content. Safe to repeat: nothing is written twice."""
    return tuple(_upload(store, path) for path in sorted(folder.iterdir()) if _is_asset(path))


def _is_asset(path: Path) -> bool:
    if not path.is_file() or path.name in _FOREIGN_NAMES:
        return False
    return path.suffix in _SUFFIXES and path.stat().st_size <= _MAX_ASSET_NBYTES


def _upload(store: Store, path: Path) -> AssetRef:
    """Not create-only, which may be slow: whoever writes this key writes these bytes."""
    sha256 = sha256_of(path)
    key = keys.asset(sha256)
    if store.head(key) is None:
        store.put_file(key, path)
    return AssetRef(key=key, nbytes=path.stat().st_size, sha256=sha256, name=path.name)
