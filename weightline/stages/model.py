"""The folder that the first stage starts from: weights in bf16, config and tokenizer, whatever the recipe names."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from weightline.stages.load import recipe_error
from weightline.stages.recipe import ModelConfig, TinyModelConfig

EOS_TOKEN = "<|endoftext|>"  # noqa: S105 - a token of text
PAD_TOKEN = "<|pad|>"  # noqa: S105 - a token of text
#: 256 bytes, end of text, padding.
VOCAB_SIZE = 258


def materialize_model(config: ModelConfig, folder: str | Path, seed: int) -> Path:
    """Put the recipe's model into `folder` as a model in bf16 with its tokenizer, ready for `from_pretrained`.

    Builds the tiny model, or loads `config.path` (from disk or the Hub) and casts it. Same input, same bits. Safe to
    repeat; a crash leaves a folder to be written again. Raises RecipeError when there is no such model.
    """
    folder = Path(folder)
    if config.tiny is not None:
        build_tiny_model(config.tiny, seed).save_pretrained(folder)
        build_byte_tokenizer(config.tiny.max_position_embeddings).save_pretrained(folder)
        return folder
    path = str(Path(config.path or "").expanduser()) if (config.path or "").startswith("~") else config.path
    try:
        model = AutoModelForCausalLM.from_pretrained(path, revision=config.revision, dtype=torch.bfloat16)
        tokenizer = AutoTokenizer.from_pretrained(path, revision=config.revision)
    except (OSError, ValueError) as error:
        remedy = "give a folder or a Hub id of a causal language model, and log in where it is gated"
        raise recipe_error("model.path", f"{config.path} cannot be loaded: {error}", remedy) from error
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def build_tiny_model(config: TinyModelConfig, seed: int) -> Qwen3ForCausalLM:
    """A Qwen3 with random bf16 weights. One (config, seed), one set of bits."""
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
    """One token a byte: the id of a byte is its value, 256 ends a text, 257 pads. Loads with AutoTokenizer."""
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
    """The printable character that stands for each byte in a byte-level vocabulary (GPT-2's table)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
