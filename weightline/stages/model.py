"""Writes the folder that the first stage starts from: weights, config and tokenizer.

The weights that a loader reads, and the small files that a version of the checkpoint would have, are linked or copied
with their paths: code and chat templates in subfolders, too. Where the recipe names a dtype, floating-point
tensors of another one are cast, one file in memory at a time, except for those that the architecture keeps in float32.
Ranks then load the folder under ZeRO-3, each keeping its own part.
"""

from __future__ import annotations

import json
import logging
import tempfile
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from weightline.chain import open_chain
from weightline.chain.files.checkpoint import write_checkpoint
from weightline.chain.files.small_files import find_small_files, foreign_patterns
from weightline.chain.files.weight_files import index_of, weight_files
from weightline.chain.read.refs import resolve
from weightline.dtypes import DtypeSetting
from weightline.errors import InputError
from weightline.files import copy_file, link_or_copy, user_path
from weightline.stages.load import recipe_error
from weightline.stages.preflight import is_local_path
from weightline.stages.recipe import ModelConfig, TinyModelConfig
from weightline.stages.start_dtype import cast_dtype, is_cast, uncast_names

_logger = logging.getLogger(__name__)
_CONFIG = "config.json"

EOS_TOKEN = "<|endoftext|>"  # noqa: S105 - a token of text
PAD_TOKEN = "<|pad|>"  # noqa: S105 - a token of text
#: 256 bytes, end of text, padding.
VOCAB_SIZE = 258


def materialize_model(config: ModelConfig, folder: str | Path, seed: int, dtype: DtypeSetting = "auto") -> Path:
    """Writes the recipe's model to `folder` with its tokenizer, ready for `from_pretrained`. Returns `folder`.

    Builds the tiny model, takes `config.path` (from disk or the Hub), or replays a version of `config.chain`. `dtype`
    is the recipe's: one by name casts the weights, which is logged. The same input gives the same bits. Safe to repeat;
    after a crash, repeat the call. RecipeError when there is no such model.
    """
    folder = Path(folder)
    if config.tiny is not None:
        build_tiny_model(config.tiny, seed).to(cast_dtype(dtype) or torch.bfloat16).save_pretrained(folder)
        build_byte_tokenizer(config.tiny.max_position_embeddings).save_pretrained(folder)
        return folder
    if config.chain is not None:
        return _materialize_version(config.chain, config.version, folder, dtype)
    try:
        _materialize_path(config, folder, dtype)
    except (OSError, ValueError, SafetensorError, InputError) as error:
        remedy = "give a folder or a Hub id of a causal language model, and log in if it is gated"
        raise recipe_error("model.path", f"{config.path} cannot be loaded: {error}", remedy) from error
    return folder


def _materialize_path(config: ModelConfig, folder: Path, dtype: DtypeSetting) -> None:
    """Writes a model from disk or the Hub: file by file for safetensors, else by loading the whole model."""
    path = config.path or ""
    source = user_path(path) if is_local_path(path) else _downloaded(path, config.revision)
    if not has_safetensors(source):
        model = AutoModelForCausalLM.from_pretrained(path, revision=config.revision, dtype=cast_dtype(dtype) or "auto")
        _take_small_files(source, folder, weights=frozenset(path.name for path in source.glob("*.bin*")))
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(path, revision=config.revision).save_pretrained(folder)
        return
    with torch.device("meta"):  # raises for other than causal language models, before any copy
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source))
    AutoTokenizer.from_pretrained(source)
    wanted = cast_dtype(dtype)
    num_cast = take_files(source, folder, wanted, frozenset() if wanted is None else uncast_names(model))
    if num_cast:
        _logger.warning("%d tensors of the start model are cast: the recipe says `dtype: %s`", num_cast, dtype)


def _downloaded(repo_id: str, revision: str | None) -> Path:
    """Downloads the Hub model's files and returns their folder in the Hub's own cache."""
    return Path(snapshot_download(repo_id, revision=revision, ignore_patterns=foreign_patterns()))


def _materialize_version(chain_url: str, version: str, folder: Path, dtype: DtypeSetting) -> Path:
    """Writes a version's weights, with every digest checked."""
    chain = open_chain(chain_url)
    with tempfile.TemporaryDirectory(prefix="weightline-start-") as scratch:
        checkpoint = Path(scratch) / "checkpoint"
        write_checkpoint(chain, resolve(chain, version), checkpoint)
        return materialize_model(ModelConfig(path=str(checkpoint)), folder, seed=0, dtype=dtype)


def build_tiny_model(config: TinyModelConfig, seed: int) -> Qwen3ForCausalLM:
    """Returns a Qwen3 with random bf16 weights. (config, seed) determine its bits."""
    architecture = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=256,
        pad_token_id=257,
        dtype="bfloat16",
        **config.model_dump(exclude={"rope_theta"}),
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen3ForCausalLM(architecture).to(torch.bfloat16)


def build_byte_tokenizer(max_length: int) -> PreTrainedTokenizerFast:
    """Returns a tokenizer with one token per byte: its id is the byte's value, 256 ends a text, 257 pads.

    AutoTokenizer loads it.
    """
    vocab = {_byte_symbols()[byte]: byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([EOS_TOKEN, PAD_TOKEN])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS_TOKEN,
        pad_token=PAD_TOKEN,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


def _byte_symbols() -> list[str]:
    """Returns the printable character for each byte in a byte-level vocabulary (GPT-2's table)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def has_safetensors(source: Path) -> bool:
    """Returns whether the folder has a config and weights in safetensors files."""
    return (source / _CONFIG).is_file() and any(source.glob("*.safetensors"))


def take_files(
    source: Path, folder: Path, dtype: torch.dtype | None = None, uncast: frozenset[str] = frozenset()
) -> int:
    """Copies the model of `source` to `folder`. Returns how many tensors were cast.

    With a `dtype`, floating-point tensors of another one are cast, except for those named in `uncast`. Files without a
    cast are hard-linked if possible. Safe to repeat; after a crash, repeat the call. OSError without enough space;
    InputError for a folder that is no checkpoint; ValueError or SafetensorError for broken files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = weight_files(source)
    num_cast = sum(_take_weights(path.resolve(), folder / path.name, dtype, uncast) for path in weights)
    index = index_of(source)
    if index is not None:
        copy_file(index, folder / index.name)
    _take_small_files(source, folder, frozenset(path.name for path in weights))
    if dtype is not None:
        config = folder / _CONFIG
        config.write_text(_with_dtype(config.read_text(encoding="utf-8"), dtype), encoding="utf-8")
    return num_cast


def _take_small_files(source: Path, folder: Path, weights: frozenset[str] = frozenset()) -> None:
    """Copies what a loader may read beside the weights. Names in one line of the log what is left out."""
    found = find_small_files(source, weights=weights)
    if found.left_out:
        _logger.warning("%s: left out of the start model: %s", source, ", ".join(found.left_out))
    for name in found.taken:
        copy_file(source / name, folder / name)


def _take_weights(source: Path, target: Path, dtype: torch.dtype | None, uncast: frozenset[str]) -> int:
    target.unlink(missing_ok=True)
    with safe_open(source, framework="pt") as file:
        names = list(file.keys())
        cast = {name for name in names if name not in uncast and is_cast(file.get_slice(name).get_dtype(), dtype)}
        if not cast:
            link_or_copy(source, target)
            return 0
        tensors = {name: file.get_tensor(name) for name in names}
    save_file({n: t.to(dtype) if n in cast else t for n, t in tensors.items()}, target, metadata={"format": "pt"})
    return len(cast)


def _with_dtype(config: str, dtype: torch.dtype) -> str:
    document = json.loads(config)
    document.pop("torch_dtype", None)
    return json.dumps(document | {"dtype": str(dtype).removeprefix("torch.")}, indent=2) + "\n"
