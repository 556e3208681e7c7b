"""The model's small files, saved as transformers would save them."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

from weightline.chain.files.assets import upload_files
from weightline.format.manifest import AssetRef
from weightline.store import Store
from weightline.trainer.adapter import is_peft_model, save_adapter_config


def upload_assets(
    store: Store, model: Any, processing_class: Any = None, held: tuple[AssetRef, ...] = ()
) -> tuple[AssetRef, ...]:
    """Put config, generation config and tokenizer into the chain, but for `held` ones; of an adapter, its config.

    Safe to repeat.
    """
    with tempfile.TemporaryDirectory(prefix="weightline-assets-") as folder:
        parts: tuple[Any, ...] = (_config_of(model), getattr(model, "generation_config", None))
        if is_peft_model(model):
            parts = ()
            save_adapter_config(model, Path(folder))
        for part in (*parts, processing_class):
            if hasattr(part, "save_pretrained"):
                part.save_pretrained(folder)
        return upload_files(store, Path(folder), held)


def _config_of(model: Any) -> Any:
    """The config as `save_pretrained` of the model would write it: naming its class."""
    config = copy.deepcopy(getattr(model, "config", None))
    if config is not None and not getattr(config, "architectures", None):
        config.architectures = [type(model).__name__]
    return config
