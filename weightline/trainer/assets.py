"""The small files that make weights a loadable model: config, generation config, tokenizer."""

from __future__ import annotations

import copy
import hashlib
import tempfile
from pathlib import Path
from typing import Any

from weightline.errors import ObjectExistsError
from weightline.format import keys
from weightline.format.manifest import AssetRef
from weightline.store import Store

_MAX_ASSET_NBYTES = 64 * 1024 * 1024


def upload_assets(store: Store, model: Any, processing_class: Any = None) -> tuple[AssetRef, ...]:
    """Save config and tokenizer as transformers would, and put each file under the name of its content.

    Safe to repeat: an asset that the chain has already is not written again.
    """
    with tempfile.TemporaryDirectory(prefix="weightline-assets-") as name:
        folder = Path(name)
        parts: tuple[Any, ...] = (_config_of(model), getattr(model, "generation_config", None), processing_class)
        for part in parts:
            if hasattr(part, "save_pretrained"):
                part.save_pretrained(folder)
        return tuple(_upload(store, path) for path in sorted(folder.iterdir()) if _is_asset(path))


def _config_of(model: Any) -> Any:
    """The config as `save_pretrained` of the model would write it: naming its class."""
    config = copy.deepcopy(getattr(model, "config", None))
    if config is not None and not getattr(config, "architectures", None):
        config.architectures = [type(model).__name__]
    return config


def _is_asset(path: Path) -> bool:
    return path.is_file() and path.suffix != ".safetensors" and path.stat().st_size <= _MAX_ASSET_NBYTES


def _upload(store: Store, path: Path) -> AssetRef:
    body = path.read_bytes()
    sha256 = hashlib.sha256(body).hexdigest()
    key = keys.asset(sha256)
    try:
        store.put_if_absent(key, body)
    except ObjectExistsError:
        pass
    return AssetRef(key=key, nbytes=len(body), sha256=sha256, name=path.name)
