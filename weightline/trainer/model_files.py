"""Writes the small files of the model in training as the libraries would save them, and notices when they change.

They are written at the start, and again at a sync after something has changed them: a generation configuration, a
tokenizer or its template. A look at every sync costs about a millisecond, because it serializes no vocabulary.
"""

from __future__ import annotations

import copy
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from weightline.chain.files.assets import assets_of, upload_files
from weightline.chain.read.history import Chain
from weightline.errors import InputError
from weightline.format.manifest import AssetRef
from weightline.store import Store
from weightline.trainer.adapter import is_peft_model, save_adapter_config
from weightline.trainer.published_dtype import config_of_cast

#: Parts of a fast tokenizer that can be replaced. Its vocabulary is known by its size and its added tokens.
_TOKENIZER_PARTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
_TOKENIZER_FACTS = (
    "chat_template", "special_tokens_map", "added_tokens_decoder", "model_max_length", "padding_side",
    "truncation_side", "response_template",
)  # fmt: skip
_VOCABULARY = ("vocab", "merges", "tokenizer_object")
_PROCESSOR_PARTS = ("tokenizer", "image_processor", "feature_extractor", "video_processor")

_logger = logging.getLogger(__name__)


def upload_assets(
    store: Store,
    model: Any,
    processing_class: Any = None,
    held: tuple[AssetRef, ...] = (),
    dtype: str | None = None,
) -> tuple[AssetRef, ...]:
    """Uploads what the model and the tokenizer or processor save beside weights, except `held` files.

    For an adapter: its config and tokenizer. `dtype`: the one that the config names instead of the model's own. Returns
    all of them. Safe to repeat.
    """
    with tempfile.TemporaryDirectory(prefix="weightline-assets-") as folder:
        if is_peft_model(model):
            save_adapter_config(model, Path(folder))
        else:
            _save_model_files(model, Path(folder), dtype)
        if hasattr(processing_class, "save_pretrained"):
            processing_class.save_pretrained(folder)
        return upload_files(store, Path(folder), held, is_saved=True)


class ModelFiles:
    """The small files of one model in training. For rank 0 and the training thread."""

    def __init__(self, chain: Chain, model: Any, processing_class: Any, dtype: str | None = None) -> None:
        """`dtype`: as in `upload_assets`."""
        self._chain = chain
        self._processing_class = processing_class
        self._dtype = dtype
        self._seen = _fingerprint(model, processing_class)

    def changed(self, model: Any) -> tuple[AssetRef, ...]:
        """Returns all small files of the model if one says something new since the last call, else none. Uploads them.

        A failure is logged, and the next call tries again: the weights do not wait for a small file.
        """
        found = _fingerprint(model, self._processing_class)
        if found is None or found == self._seen:
            return ()
        try:
            tip = self._chain.tip_version()
            held = () if tip is None else assets_of(self._chain, tip)
            assets = upload_assets(self._chain.store, model, self._processing_class, held, self._dtype)
        except Exception as error:  # noqa: BLE001 - libraries raise anything when a configuration is not valid
            _logger.warning("the model's small files changed and cannot be saved, versions keep the old: %s", error)
            return ()
        self._seen = found
        return () if assets == held else assets


def processing_class_of(arguments: dict[str, Any]) -> Any:
    """Returns the tokenizer or processor that the trainer saves, from the arguments of its callbacks.

    Without one of its own the trainer saves that of the data collator.
    """
    found = arguments.get("processing_class")
    if found is not None:
        return found
    collator = getattr(arguments.get("train_dataloader"), "collate_fn", None)
    tokenizers = (getattr(one, "tokenizer", None) for one in (collator, getattr(collator, "data_collator", None)))
    return next((one for one in tokenizers if one is not None), None)


def _save_model_files(model: Any, folder: Path, dtype: str | None) -> None:
    """Writes what the model's `save_pretrained` writes beside weights: its code, config and generation config."""
    config = config_of_cast(_config_of(model), dtype)
    if getattr(type(model), "_auto_class", None) is not None:
        from transformers.dynamic_module_utils import custom_object_save

        try:
            custom_object_save(model, folder, config=config)
        except OSError as error:
            raise InputError(
                f"the code of {type(model).__name__} cannot be read: {error}. Keep its files while it trains"
            ) from error
    can_generate = getattr(model, "can_generate", lambda: True)()
    parts: tuple[Any, ...] = (config, getattr(model, "generation_config", None) if can_generate else None)
    for part in parts:
        if hasattr(part, "save_pretrained"):
            part.save_pretrained(folder)


def _config_of(model: Any) -> Any:
    """Returns the config as the model's `save_pretrained` would write it, with the names of its class and its dtype."""
    config = copy.deepcopy(getattr(model, "config", None))
    # A wrapper, such as that of torch.compile, has the config of its model but not its class.
    is_model = hasattr(type(model), "save_pretrained")
    if config is not None and (is_model or not getattr(config, "architectures", None)):
        config.architectures = [type(model).__name__.removeprefix("FSDP")]
    if config is not None and is_model and isinstance(getattr(model, "dtype", None), torch.dtype):
        config.dtype = str(model.dtype).removeprefix("torch.")
    return config


def _fingerprint(model: Any, processing_class: Any) -> str | None:
    """Returns a text that changes with what the files would say. It may also change when they would not.

    None, with a line in the log, for a model or tokenizer that cannot be looked at: its files stay those of the start.
    """
    try:
        parts = [_facts_of_config(getattr(model, name, None)) for name in ("config", "generation_config")]
        if is_peft_model(model):
            parts += [repr(sorted(vars(config).items(), key=str)) for config in model.peft_config.values()]
        return "\n".join([*parts, *_facts_of_processor(processing_class)])
    except Exception as error:  # noqa: BLE001 - code of models and tokenizers raises anything
        _logger.warning("changes of the model's small files are not seen: %r", error)
        return None


def _facts_of_config(config: Any) -> str:
    return repr(config.to_dict()) if hasattr(config, "to_dict") else ""


def _facts_of_processor(processor: Any) -> Iterator[str]:
    init_kwargs = getattr(processor, "init_kwargs", {})
    yield repr({name: value for name, value in init_kwargs.items() if name not in _VOCABULARY})
    yield from (repr(getattr(processor, name, None)) for name in _TOKENIZER_FACTS)
    if hasattr(processor, "to_dict"):
        yield _facts_of_config(processor)
    backend = getattr(processor, "backend_tokenizer", None)
    for name in _TOKENIZER_PARTS:
        part = getattr(backend, name, None)
        yield "" if part is None else repr(part.__getstate__())
    if hasattr(processor, "__len__"):
        yield str(len(processor))
    for name in _PROCESSOR_PARTS:
        part = getattr(processor, name, None)
        if part is not None and part is not processor:
            yield from _facts_of_processor(part)
