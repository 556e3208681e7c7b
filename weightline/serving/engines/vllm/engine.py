"""vLLM behind the `Engine` interface, in this process or in another: the same, whatever carries the calls.

Legend: N elements of a tensor, K changed ones.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Protocol

from weightline.chain.files.source import FolderSource
from weightline.codec.digest import digest_change, format_digest
from weightline.errors import ApplyError, DigestMismatchError, UnsupportedFeatureError
from weightline.files import sha256_of
from weightline.serving.engines.base import Completion, Generation, GenerationRequest
from weightline.serving.engines.vllm.exchange import exchange_folder, write_changes
from weightline.serving.engines.vllm.memory import RecentBits
from weightline.serving.engines.vllm.workers import Channel, Workers
from weightline.types import BitsArray, Changes, PositionArray, TensorSpec

#: What vLLM reads once, when it starts: config, tokenizer and templates, processors, the model's own code.
_READ_AT_START = (
    "config.json", "generation_config.json", "chat_template.*", "*token*", "vocab.*", "merges.txt", "*.model",
    "*.tiktoken", "*processor_config.json", "*.py",
)  # fmt: skip


class Transport(Channel, Protocol):
    """What carries calls to a vLLM. Errors are ApplyError."""

    def pause(self) -> None:
        """Stand still; requests that the barrier let through wait in vLLM's queue."""
        ...

    def resume(self) -> None: ...

    def forget_prefixes(self) -> None:
        """Drop every cached key-value block. Called in a pause."""
        ...

    def tell_version(self, version: int | None) -> None:
        """Let vLLM name the version in its own answers, where it can."""
        ...

    def generate(self, request: GenerationRequest) -> tuple[tuple[Completion, ...], int]:
        """(completions, number of prompt tokens)."""
        ...


class Barrier(Protocol):
    """What stands between requests and a refresh; see weightline/serving/engines/barrier.py."""

    def request(self) -> AbstractContextManager[None]: ...

    def drain(self, timeout_seconds: float) -> None: ...

    def release(self) -> None: ...


class VllmEngine:
    """Implements `StagingEngine`. `model_folder`: what vLLM was started with. `close` it to free the shared memory."""

    name = "vllm"

    def __init__(self, transport: Transport, barrier: Barrier, model_folder: Path) -> None:
        self.version: int | None = None
        self._transport, self._barrier = transport, barrier
        self._started_with = _files_read_at_start(model_folder)
        self._workers = Workers(transport)
        self._specs: dict[str, TensorSpec] = {}
        self._closing = ExitStack()
        self._folder = self._closing.enter_context(exchange_folder())
        self._file_numbers = itertools.count()
        self._recent = RecentBits()
        self._staged: tuple[Changes, ...] = ()
        self._staged_digests: dict[str, int] = {}
        self._calling = threading.RLock()

    def close(self) -> None:
        """Safe to repeat; the engine is not to be used afterwards."""
        self._closing.close()

    def require_assets(self, sha256_of: Mapping[str, str]) -> None:
        for name, sha256 in sha256_of.items():
            if _is_read_at_start(name) and self._started_with.get(name) != sha256:
                raise UnsupportedFeatureError(
                    f"{name} of this version is not the one that vLLM was started with: restart the server to serve it",
                    feature="another model's files", engine=self.name, file=name,
                )  # fmt: skip

    def load(self, folder: Path) -> None:
        specs = FolderSource(folder).specs
        with self._calling:
            self._forget()
            self._workers.load(folder)
            self._workers.learn(specs)
            self._specs = specs
            self._transport.forget_prefixes()

    def specs(self) -> Mapping[str, TensorSpec]:
        return self._specs

    def read_bits(self, name: str) -> BitsArray:
        with self._calling:
            held = self._recent.get(name)
            if held is None:
                held = self._workers.read_bits(self._specs[name], self._new_file())
                self._recent.put(name, held)
            return held

    def read_elements(self, name: str, positions_K: PositionArray) -> BitsArray:
        return self.read_bits(name)[positions_K]

    def read_digests(self) -> dict[str, int]:
        with self._calling:
            return self._workers.read_digests(self._specs)

    def stage(self, changes: Sequence[Changes]) -> None:
        with self._calling:
            self._staged = ()
            path = self._new_file()
            write_changes(path, changes)
            try:
                num_placed = self._workers.stage(path)
            finally:
                path.unlink()
            num_changed = sum(one.num_changed for one in changes)
            if num_placed != num_changed:
                raise ApplyError(f"{num_placed} of {num_changed} changed elements have a place in the engine")
            self._staged_digests = {one.segment.tensor.name: digest_change(one) for one in changes}
            self._staged = tuple(changes)
            # Now rather than in the pause: giving back a model's worth of shared memory takes longer than the write.
            self._recent.clear()

    def scatter(self, changes: Sequence[Changes]) -> None:
        """As `Engine.scatter`, and proves what it wrote: DigestMismatchError. Without `stage` before, it stages."""
        with self._calling:
            is_back = _is_inverse(changes, self._staged)
            if not is_back and not _is_same(changes, self._staged):
                self.stage(changes)
            self._recent.clear()
            written = self._workers.write(is_back=is_back)
            if not is_back:
                _require_equal(written, self._staged_digests)
            self._transport.forget_prefixes()

    def set_version(self, version: int | None) -> None:
        self.version = version
        self._transport.tell_version(version)

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
            version = self.version
            if version is None:
                raise ApplyError("no checked version is loaded: ask again after the next refresh", engine=self.name)
            completions, num_prompt_tokens = self._transport.generate(request)
        return Generation(version, completions, num_prompt_tokens)

    def _forget(self) -> None:
        self._recent.clear()
        self._staged = ()

    def _new_file(self) -> Path:
        return self._folder / f"{next(self._file_numbers)}.bin"


def _is_same(changes: Sequence[Changes], staged: Sequence[Changes]) -> bool:
    """The very objects: equal ones are staged again."""
    return len(changes) == len(staged) and all(one is other for one, other in zip(changes, staged, strict=True))


def _is_inverse(changes: Sequence[Changes], staged: Sequence[Changes]) -> bool:
    """What `weightline.codec.changes.inverse` makes of them: the same arrays, old and new exchanged."""
    return bool(staged) and len(changes) == len(staged) and all(
        one.positions_K is other.positions_K and one.old_K is other.new_K and one.new_K is other.old_K
        for one, other in zip(changes, staged, strict=True)
    )  # fmt: skip


def _require_equal(written: Mapping[str, int], expected: Mapping[str, int]) -> None:
    """DigestMismatchError unless the workers wrote, together, exactly the changes."""
    for name, digest in expected.items():
        if written.get(name) != digest:
            raise DigestMismatchError(
                f"the workers' writes do not add up to the change of {name}",
                what=name, expected=format_digest(digest), actual=format_digest(written.get(name, 0)),
            )  # fmt: skip


def _files_read_at_start(model_folder: Path) -> dict[str, str]:
    """sha256 by name."""
    files = (path for path in model_folder.iterdir() if path.is_file())
    return {path.name: sha256_of(path) for path in files if _is_read_at_start(path.name)}


def _is_read_at_start(name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in _READ_AT_START)
