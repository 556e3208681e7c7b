"""The embedded engine: a transformers model in this process. For CPUs, small models and tests; one request at a time.

Every request computes its own key-value cache and drops it, so no cached state of an old version outlives a refresh.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.utils import logging as transformers_logging

from weightline.codec.coding import num_threads_for, ordered_map
from weightline.codec.torch_ops import torch_dtype
from weightline.errors import ApplyError, InputError
from weightline.serving.engines.barrier import RequestBarrier
from weightline.serving.engines.base import (
    DEFAULT_MAX_TOKENS,
    Abilities,
    Completion,
    Conversation,
    Generation,
    GenerationRequest,
    InProcessEngine,
    Prompt,
)
from weightline.serving.engines.float32 import compute_in_float32
from weightline.serving.engines.in_place import LiveWeights
from weightline.serving.engines.sampling import Draw, Sampler
from weightline.serving.http.names import COMPLETIONS_ROUTE, ROLLOUTS_ROUTE
from weightline.types import BitsArray, Changes, PositionArray, TensorSpec

#: Dtypes that transformers can compute in.
_FLOATS = frozenset({"F16", "BF16", "F32", "F64"})
#: Samples of a request that are computed together, and the bytes that their caches and logits take, at most. Further
#: ones follow, on the same version.
_MAX_ROWS = 256
_MAX_BATCH_NBYTES = 1024**3
_TYPICAL_CACHE_NBYTES = 128 * 1024


class TransformersEngine(InProcessEngine):
    """Implements `Engine` on a transformers model in this process."""

    name = "transformers"

    def __init__(self, device: str | None = None) -> None:
        self.device = _usable_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.version: int | None = None
        self._barrier = RequestBarrier(max_in_flight=1)
        self._model: Any = None
        self._tokenizer: Any = None
        self._weights: LiveWeights | None = None

    @property
    def abilities(self) -> Abilities:
        length = None if self._model is None else getattr(self._model.config, "max_position_embeddings", None)
        return Abilities("processed_logprobs", length, rollout_routes=(ROLLOUTS_ROUTE, COMPLETIONS_ROUTE))

    def require_assets(self, sha256_of: Mapping[str, str], meaning_of: Callable[[str], str]) -> None:
        """Accepts all files, since config and tokenizer are loaded with the weights."""

    def load(self, folder: Path) -> None:
        with _quiet_loading(), _load_errors(folder):
            model, info = AutoModelForCausalLM.from_pretrained(
                folder, dtype=_dtype_of(folder), local_files_only=True, output_loading_info=True
            )
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        unfilled = sorted(set(info["missing_keys"]) | {str(key) for key in info["mismatched_keys"]})
        if unfilled:
            raise ApplyError(f"{folder} does not fill {unfilled[0]} ({len(unfilled)} such tensors)", tensor=unfilled[0])
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        tokenizer.padding_side = "left"
        model = _owning_memory(model.eval().requires_grad_(False).to(self.device))
        model.generation_config = _only_token_ids(model.generation_config)
        if self.device.type == "cpu":
            compute_in_float32(model)
        self._weights, self._model, self._tokenizer = LiveWeights(model), model, tokenizer

    def specs(self) -> Mapping[str, TensorSpec]:
        return self._weights.specs if self._weights else {}

    def read_bits(self, name: str) -> BitsArray:
        return self._loaded().read_bits(name)

    def read_elements(self, name: str, positions_K: PositionArray) -> BitsArray:
        return self._loaded().read_elements(name, positions_K)

    def scatter(self, changes: Sequence[Changes]) -> None:
        num_threads = num_threads_for(sum(one.num_changed for one in changes))
        for _ in ordered_map(self.scatter_tensor, changes, num_threads):
            pass

    def scatter_tensor(self, changes: Changes) -> None:
        """Writes one tensor's new bits. Safe to repeat."""
        self._loaded().scatter(changes)

    def set_version(self, version: int | None) -> None:
        self.version = version

    def pause(self, timeout_seconds: float) -> None:
        self._barrier.drain(timeout_seconds)

    def resume(self) -> None:
        self._barrier.release()

    @torch.inference_mode()
    def generate(self, request: GenerationRequest) -> Generation:
        with self._barrier.request():
            version = request.bounds.require(self.version)
            prompts = [self._token_ids(prompt) for prompt in request.prompts]
            request = replace(request, max_tokens=self._checked_limit(prompts, request.max_tokens))
            rows = _rows_of(prompts, request)
            num_at_once = self._num_rows_at_once(prompts, request)
            samples: list[Completion] = []
            for first in range(0, len(rows), num_at_once):
                samples += self._sample(rows[first : first + num_at_once], request)
            tokenizer = self._tokenizer
        texts = _token_texts(tokenizer, samples) if request.is_text_wanted else {}
        return Generation(version, tuple(samples), tuple(map(tuple, prompts)), texts)

    def _sample(self, rows: Sequence[_Row], request: GenerationRequest) -> list[Completion]:
        """Returns a completion of every row, by one batch."""
        assert request.max_tokens is not None
        batch = self._tokenizer.pad({"input_ids": [list(row.prompt) for row in rows]}, return_tensors="pt")
        width = batch["input_ids"].shape[1]
        sampler = Sampler(
            request.temperature, request.top_p, [row.draw for row in rows], request.max_tokens, request.num_top_logprobs
        )
        stopping = [StopStrings(self._tokenizer, request.stop, width)] if request.stop else []
        output = self._model.generate(
            input_ids=batch["input_ids"].to(self.device),
            attention_mask=batch["attention_mask"].to(self.device),
            max_new_tokens=request.max_tokens,
            do_sample=False,
            logits_processor=LogitsProcessorList([sampler]),
            stopping_criteria=StoppingCriteriaList(stopping),
            pad_token_id=self._tokenizer.pad_token_id,
        )
        logprobs, top_logprobs = sampler.logprobs(), sampler.top_logprobs()
        return [
            self._completion(
                self._ended(tokens, stopping[0].ended_after.get(row) if stopping else None),
                request,
                logprobs[row] if logprobs else None,
                top_logprobs[row] if top_logprobs else (),
            )
            for row, tokens in enumerate(output[:, width:].tolist())
        ]

    def _ended(self, tokens: list[int], stop_length: int | None) -> tuple[list[int], bool]:
        """Returns the sample's own tokens, and whether something else than the limit ended it. The rest is padding."""
        ends = self._end_ids()
        length = next((at + 1 for at, token in enumerate(tokens) if token in ends), None)
        lengths = [one for one in (length, stop_length) if one is not None]
        return tokens[: min(lengths, default=len(tokens))], bool(lengths)

    def _completion(
        self,
        ended: tuple[list[int], bool],
        request: GenerationRequest,
        logprobs: list[float] | None,
        top_logprobs: Sequence[Mapping[int, float]],
    ) -> Completion:
        tokens, is_ended = ended
        spoken = tokens[:-1] if tokens and tokens[-1] in self._end_ids() else tokens
        text = self._tokenizer.decode(spoken, skip_special_tokens=True) if request.is_text_wanted else ""
        cut = cut_at_stop(text, request.stop)
        return Completion(
            text if cut is None else cut,
            "stop" if is_ended or cut is not None else "length",
            tuple(tokens),
            None if logprobs is None else tuple(logprobs[: len(tokens)]),
            tuple(top_logprobs[: len(tokens)]),
        )

    def _end_ids(self) -> set[int]:
        """Returns the tokens by which the model ends a text."""
        ends = self._model.generation_config.eos_token_id
        return set() if ends is None else {ends} if isinstance(ends, int) else set(ends)

    def _num_rows_at_once(self, prompts: list[list[int]], request: GenerationRequest) -> int:
        """Returns how many samples are computed together, so that caches and logits stay below a number of bytes."""
        assert request.max_tokens is not None
        num_positions = max(map(len, prompts)) + request.max_tokens
        row_nbytes = num_positions * _cache_nbytes(self._model) + 32 * self._vocab_size()
        return max(1, min(_MAX_ROWS, _MAX_BATCH_NBYTES // row_nbytes))

    def _vocab_size(self) -> int:
        num_embeddings: int = self._model.get_input_embeddings().num_embeddings
        return num_embeddings

    def _token_ids(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, Conversation):
            # The template writes the special tokens itself.
            ids = list(self._tokenizer(self._templated(prompt), add_special_tokens=False)["input_ids"])
        else:
            ids = list(self._tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt)
        vocab_size = self._vocab_size()
        if not ids or not all(0 <= token < vocab_size for token in ids):
            raise InputError(f"a prompt needs at least one token, and token ids below {vocab_size}", field="prompt")
        return ids

    def _templated(self, conversation: Conversation) -> str:
        """Returns the conversation as the version's chat template writes it, up to where the answer begins."""
        if not getattr(self._tokenizer, "chat_template", None):
            raise InputError(
                f"version {self.version} has no chat template: ask /v1/completions with a prompt", field="messages"
            )
        messages = [dict(message) for message in conversation.messages]
        try:
            return str(self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        except Exception as error:
            # A template is a program that comes with the version: what it raises is its way to refuse messages.
            raise InputError(f"the chat template does not take these messages: {error}", field="messages") from error

    def _checked_limit(self, rows: list[list[int]], max_tokens: int | None) -> int:
        """Returns the most new tokens. InputError when prompt and answer exceed the model's positions."""
        limit = getattr(self._model.config, "max_position_embeddings", None)
        longest = max(map(len, rows))
        if max_tokens is None:
            max_tokens = DEFAULT_MAX_TOKENS if limit is None else max(1, min(DEFAULT_MAX_TOKENS, limit - longest))
        if limit is not None and longest + max_tokens > limit:
            raise InputError(
                f"a prompt of {longest} tokens and max_tokens {max_tokens} exceed the model's {limit} positions",
                field="max_tokens",
            )
        return max_tokens

    def _loaded(self) -> LiveWeights:
        if self._weights is None:
            raise ApplyError("no model is loaded", engine=self.name)
        return self._weights


def _usable_device(name: str) -> torch.device:
    """Returns the device. InputError for a name that torch does not support, or a device that is not available."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        problem = str(error).splitlines()[0][:200]
        raise InputError(f"device {name!r} cannot be used: {problem}", field="device") from error
    return device


def _owning_memory(model: torch.nn.Module) -> torch.nn.Module:
    """Copies the tensors to memory of this process.

    Loading maps the checkpoint's file, and the first write to each mapped page would cost a page fault in the pause.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    return model


def _only_token_ids(config: GenerationConfig) -> GenerationConfig:
    """Returns the config without the checkpoint's sampling defaults, since a request names all of its sampling."""
    return GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )


@dataclass(frozen=True, slots=True)
class _Row:
    """One sample to draw."""

    prompt: Sequence[int]
    draw: Draw


def _rows_of(prompts: Sequence[Sequence[int]], request: GenerationRequest) -> list[_Row]:
    """Returns the samples of all prompts, those of a prompt together."""
    unrepeated = secrets.randbits(62)
    seeds = request.seeds or [unrepeated + number for number in range(len(prompts))]
    return [
        _Row(prompt, Draw(seed, number))
        for prompt, seed in zip(prompts, seeds, strict=True)
        for number in range(request.num_samples)
    ]


def _cache_nbytes(model: Any) -> int:
    """Returns the bytes of keys and values that a position takes, at most: models may keep fewer of them.

    A model whose config does not say it is taken for one of a billion parameters.
    """
    config = model.config.get_text_config()
    num_layers, num_heads, width = (
        getattr(config, name, None) for name in ("num_hidden_layers", "num_attention_heads", "hidden_size")
    )
    if not (isinstance(num_layers, int) and isinstance(num_heads, int) and isinstance(width, int)):
        return _TYPICAL_CACHE_NBYTES
    head_dim = getattr(config, "head_dim", None) or width // num_heads
    num_kept = getattr(config, "num_key_value_heads", None) or num_heads
    nbytes: int = 2 * num_layers * num_kept * head_dim * model.dtype.itemsize
    return nbytes


def _token_texts(tokenizer: Any, samples: Sequence[Completion]) -> dict[int, str]:
    """Returns the text of every token that has a logprob."""
    ids = {token for one in samples if one.logprobs is not None for token in one.token_ids}
    ids |= {token for one in samples for step in one.top_logprobs for token in step}
    return {token: tokenizer.decode([token]) for token in ids}


def _dtype_of(folder: Path) -> torch.dtype | str:
    """Returns the only float dtype of the checkpoint, so that loading casts nothing; `auto` when it has several."""
    found: set[str] = set()
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 - not a mapping
    floats = [torch_dtype(code) for code in found & _FLOATS]
    return floats[0] if len(floats) == 1 else "auto"


@contextlib.contextmanager
def _load_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        raise ApplyError(f"transformers cannot load {folder}: {error}", engine=TransformersEngine.name) from error


@contextlib.contextmanager
def _quiet_loading() -> Iterator[None]:
    """Turns off the progress bars of transformers for the block."""
    was_enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            transformers_logging.enable_progress_bar()


#: Number of tokens without a character of their own (special tokens, parts of a character) that may come with a stop
#: string.
_SLACK_TOKENS = 8


def cut_at_stop(text: str, stop: Sequence[str]) -> str | None:
    """Returns the text before the first stop string; None when it contains none."""
    found = [at for one in stop if (at := text.find(one)) >= 0]
    return text[: min(found)] if found else None


class StopStrings(StoppingCriteria):
    """Marks the rows whose new text contains a stop string. A token is at least a byte, so only the tail is decoded."""

    def __init__(self, tokenizer: Any, stop: Sequence[str], prompt_width: int) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._first = prompt_width
        self._window = max(len(one.encode()) for one in stop) + _SLACK_TOKENS
        self.ended_after: dict[int, int] = {}
        """The number of new tokens with which a row first contained a stop string, by row."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        new = input_ids[:, max(self._first, input_ids.shape[1] - self._window) :]
        texts = self._tokenizer.batch_decode(new, skip_special_tokens=True)
        is_done = [cut_at_stop(text, self._stop) is not None for text in texts]
        for row, is_found in enumerate(is_done):
            if is_found:
                self.ended_after.setdefault(row, input_ids.shape[1] - self._first)
        return torch.tensor(is_done, dtype=torch.bool, device=input_ids.device)
