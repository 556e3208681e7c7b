"""Implements `Engine` for vLLM: this process drives workers in other processes over vLLM's control channel.

A `Transport` carries the calls: `http.OnlineTransport` in a vLLM server, `OfflineTransport` around a `vllm.LLM`. The
arrays pass through shared memory, see `wire`.

Legend: N elements of a tensor, K changed ones.
"""

from __future__ import annotations

import hashlib
import itertools
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Protocol

from cachetools import LRUCache

from weightline.chain.files.meaning import meaning_of
from weightline.chain.files.source import FolderSource
from weightline.codec.digest import digest_change, format_digest
from weightline.errors import ApplyError, DigestMismatchError, InputError, UnsupportedFeatureError
from weightline.serving.engines.barrier import RequestBarrier
from weightline.serving.engines.base import (
    NO_ABILITIES,
    Abilities,
    Completion,
    Conversation,
    Decoding,
    Generation,
    GenerationRequest,
)
from weightline.serving.engines.vllm.features import OFFLINE, require
from weightline.serving.engines.vllm.group import Transport, WorkerDecoding, WorkerGroup
from weightline.serving.engines.vllm.wire import (
    WORKER_EXTENSION,
    exchange_folder,
)
from weightline.types import BitsArray, Changes, TensorSpec

#: The files that vLLM reads once, when it starts: config, tokenizer and templates, processors, the model's own code.
_READ_AT_START = (
    "config.json", "generation_config.json", "*.jinja", "chat_template.*", "*token*", "vocab.*", "merges.txt",
    "*.model", "*.tiktoken", "*processor_config.json", "*.py",
)  # fmt: skip
#: Bound of the cache of tensors that were read from the workers. It always has room for one tensor.
_RECENT_NBYTES = 2 * 1024**3


class Barrier(Protocol):
    """The part of a request barrier that the engine uses; see `weightline.serving.engines.barrier`."""

    def request(self) -> AbstractContextManager[None]: ...

    def drain(self, timeout_seconds: float) -> None: ...

    def release(self) -> None: ...


class VllmEngine:
    """Implements `Engine`. `model_folder` is the one that vLLM was started with. `close` frees the shared memory."""

    name = "vllm"

    def __init__(
        self, transport: Transport, barrier: Barrier, model_folder: Path, abilities: Abilities = NO_ABILITIES
    ) -> None:
        self.version: int | None = None
        self.abilities = abilities
        self._transport, self._barrier = transport, barrier
        self._started_with = _files_read_at_start(model_folder)
        self._workers = WorkerGroup(transport)
        self._specs: dict[str, TensorSpec] = {}
        self._closing = ExitStack()
        self._folder = self._closing.enter_context(exchange_folder())
        self._file_numbers = itertools.count()
        # A delta is decoded rank by rank, and each rank reads the same tensors.
        self._recent: LRUCache[str, BitsArray] = _recent_bits({})
        self._staged_digests: dict[str, int] | None = None
        self._calling = threading.RLock()

    def close(self) -> None:
        """Removes the shared memory. Safe to repeat; the engine cannot be used afterwards."""
        self._closing.close()

    def require_assets(self, sha256_of: Mapping[str, str], meaning_of: Callable[[str], str]) -> None:
        for name, sha256 in sha256_of.items():
            if _is_read_at_start(name) and not self._has_started_with(name, sha256, meaning_of):
                raise UnsupportedFeatureError(
                    f"{name} of this version is not the one that vLLM was started with: restart the server to serve it",
                    feature="another model's files", engine=self.name, file=name,
                )  # fmt: skip

    def _has_started_with(self, name: str, sha256: str, meaning_of: Callable[[str], str]) -> bool:
        own = self._started_with.get(name)
        return own is not None and (own.sha256 == sha256 or own.meaning == meaning_of(name))

    def load(self, folder: Path) -> None:
        specs = FolderSource(folder).specs
        with self._calling:
            self._recent, self._staged_digests = _recent_bits(specs), None
            self._workers.load(folder, specs)
            self._specs = specs
            self._transport.drop_prefix_cache()

    def specs(self) -> Mapping[str, TensorSpec]:
        return self._specs

    def read_bits(self, name: str) -> BitsArray:
        with self._calling:
            bits_N = self._recent.get(name)
            if bits_N is None:
                bits_N = self._recent[name] = self._workers.read_bits(self._specs[name], self._new_file())
            return bits_N

    def read_digests(self) -> dict[str, int]:
        with self._calling:
            return self._workers.read_digests(self._specs)

    def begin_decoding(self) -> WorkerDecoding | None:
        with self._calling:
            return WorkerDecoding(self._workers, self._calling) if self._workers.can_decode else None

    def stage(self, changes: Sequence[Changes] | Decoding) -> None:
        with self._calling:
            self._staged_digests = None
            if isinstance(changes, WorkerDecoding):
                self._workers.stage_decoded(changes)
                self._staged_digests = changes.digests
            else:
                assert isinstance(changes, Sequence)
                self._workers.stage(changes, self._new_file())
                self._staged_digests = {one.segment.tensor.name: digest_change(one) for one in changes}
            # Cleared here and not in the pause: freeing as much shared memory as a model takes longer than the write.
            self._recent.clear()

    def write_staged(self) -> None:
        """See `Engine`. Workers read back the written elements; their digest changes must add up to the staged ones."""
        with self._calling:
            if self._staged_digests is None:
                raise ApplyError("nothing is staged", engine=self.name)
            self._recent.clear()
            written = self._workers.write(is_undo=False)
            _require_equal(written, self._staged_digests)
            self._transport.drop_prefix_cache()

    def undo_staged(self) -> None:
        with self._calling:
            self._recent.clear()
            self._workers.write(is_undo=True)
            self._transport.drop_prefix_cache()

    def set_version(self, version: int | None) -> None:
        self.version = version
        self._transport.report_version(version)

    def pause(self, timeout_seconds: float) -> None:
        self._barrier.drain(timeout_seconds)
        is_paused = False
        try:
            with self._calling:
                self._transport.pause()
            is_paused = True
        finally:
            if not is_paused:
                self._barrier.release()

    def resume(self) -> None:
        try:
            with self._calling:
                self._transport.resume()
        finally:
            self._barrier.release()

    def generate(self, request: GenerationRequest) -> Generation:
        with self._barrier.request():
            version = request.bounds.require(self.version)
            completions, prompts = self._transport.generate(request)
        return Generation(version, completions, prompts)

    def _new_file(self) -> Path:
        return self._folder / f"{next(self._file_numbers)}.bin"


class OfflineTransport:
    """Implements `Transport` on a `vllm.LLM` in this process, for evaluation, tests and batch work.

    `LLM` is not safe for threads, so the engine's barrier admits one request at a time.
    """

    def __init__(self, llm: Any) -> None:
        self._llm = llm

    def call_workers(self, method: str, *arguments: str) -> Sequence[str]:
        answers: Sequence[str] = self._llm.collective_rpc(method, args=arguments)
        return answers

    def pause(self) -> None:
        """Does nothing: the barrier is drained, and `LLM` computes only during a request."""

    def resume(self) -> None:
        """Does nothing: nothing was stopped."""

    def drop_prefix_cache(self) -> None:
        if not self._llm.reset_prefix_cache():
            raise ApplyError("vLLM did not reset its prefix cache", engine=VllmEngine.name)

    def report_version(self, version: int | None) -> None:
        """Does nothing: `LLM` cannot report a version, and the engine's answers carry it."""

    def generate(self, request: GenerationRequest) -> tuple[tuple[Completion, ...], tuple[tuple[int, ...], ...]]:
        try:
            outputs = self._llm.generate(prompts_of(request), samplings_of(request), use_tqdm=False)
        except ValueError as error:
            raise InputError(f"vLLM refuses the request: {error}", field="prompt") from error
        return completions_of(outputs)


def start_offline(model_folder: Path, **options: Any) -> tuple[VllmEngine, Any]:
    """Returns (engine, its `LLM`) for a folder with a config and a tokenizer. No weights are read until a `load`.

    `options` go to `vllm.LLM`. UnsupportedFeatureError when this vLLM lacks a feature that the engine needs.
    """
    require(OFFLINE)
    from vllm import LLM

    llm = LLM(str(model_folder), load_format="dummy", worker_extension_cls=WORKER_EXTENSION, **options)
    return VllmEngine(OfflineTransport(llm), RequestBarrier(max_in_flight=1), model_folder), llm


def prompts_of(request: GenerationRequest) -> list[Any]:
    """Returns the prompts in vLLM's form. InputError for a conversation: vLLM's own route has the chat template."""
    prompts: list[Any] = []
    for prompt in request.prompts:
        if isinstance(prompt, Conversation):
            raise InputError("a conversation goes to vLLM's own /v1/chat/completions", field="messages")
        prompts.append(prompt if isinstance(prompt, str) else {"prompt_token_ids": list(prompt)})
    return prompts


def samplings_of(request: GenerationRequest) -> list[Any]:
    """Returns vLLM's SamplingParams of each prompt of a request."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return [
        SamplingParams(
            n=request.num_samples,
            max_tokens=request.max_tokens,
            temperature=request.temperature,
            top_p=request.top_p,
            stop=list(request.stop) or None,
            seed=None if seed is None else _spread(seed),
            logprobs=request.num_top_logprobs,
            detokenize=request.is_text_wanted or bool(request.stop),
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        for seed in request.seeds or [None] * len(request.prompts)
    ]


def _spread(seed: int) -> int:
    """Returns a seed far from those of other prompts: vLLM counts up from it for the samples of one prompt."""
    return int.from_bytes(hashlib.blake2b(seed.to_bytes(8, "little"), digest_size=8).digest(), "little") >> 2


def completions_of(outputs: Sequence[Any]) -> tuple[tuple[Completion, ...], tuple[tuple[int, ...], ...]]:
    """Returns (completions, token ids of the prompts) of vLLM's RequestOutputs."""
    completions = tuple(_completion_of(one) for output in outputs for one in output.outputs)
    return completions, tuple(tuple(output.prompt_token_ids) for output in outputs)


def _completion_of(one: Any) -> Completion:
    token_ids, steps = tuple(one.token_ids), one.logprobs
    return Completion(
        one.text,
        "stop" if one.finish_reason == "stop" else "length",
        token_ids,
        None if steps is None else tuple(step[token].logprob for step, token in zip(steps, token_ids, strict=True)),
        tuple({token: found.logprob for token, found in step.items()} for step in steps or ()),
    )


def _recent_bits(specs: Mapping[str, TensorSpec]) -> LRUCache[str, BitsArray]:
    """Returns an empty cache that holds at least the largest tensor."""
    largest = max((spec.nbytes for spec in specs.values()), default=0)
    return LRUCache(max(_RECENT_NBYTES, largest), getsizeof=lambda bits_N: bits_N.nbytes)


def _require_equal(written: Mapping[str, int], expected: Mapping[str, int]) -> None:
    """Raises DigestMismatchError unless the workers together wrote exactly the changes."""
    for name, digest in expected.items():
        if written.get(name, 0) != digest:
            raise DigestMismatchError(
                f"the workers' writes do not add up to the change of {name}",
                what=name, expected=format_digest(digest), actual=format_digest(written.get(name, 0)),
            )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _StartFile:
    """A file that vLLM has read: the hash of its bytes, and of what it says."""

    sha256: str
    meaning: str


def _files_read_at_start(model_folder: Path) -> dict[str, _StartFile]:
    """Returns every file that vLLM reads at its start, by its path below the folder."""
    found = {}
    for path in model_folder.rglob("*"):
        name = path.relative_to(model_folder).as_posix()
        if path.is_file() and _is_read_at_start(name):
            raw = path.read_bytes()
            found[name] = _StartFile(hashlib.sha256(raw).hexdigest(), meaning_of(name, raw))
    return found


def _is_read_at_start(name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in _READ_AT_START)
