"""The interface between a replica and an inference engine.

The steps of a refresh, in their only order:
    fetch, verify, decode                while the engine serves (`begin_decoding`, or else `read_bits`)
    stage                                while the engine serves
    pause                                requests in flight end on the old version, new ones wait
    withdraw the mark, set_version(None)
    write_staged                         changed elements, in place, read back
    mark, set_version(N)
    resume                               always, also after a failure: an engine without a version refuses to answer

An engine does not depend on chains, payloads or digests of versions; a replica does not depend on fused parameters,
devices or requests.

Legend: N elements of a tensor, K changed ones. Tensors go by their checkpoint names and are flat (row-major) bits.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from weightline.codec.changes import inverse
from weightline.codec.coding import num_threads_for, ordered_map
from weightline.codec.digest import tensor_digest
from weightline.errors import ApplyError, DigestMismatchError, VersionNotServedError
from weightline.types import BitsArray, Changes, PositionArray, TensorSpec, whole


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages with `role` and `content`. The chat template of the version that answers turns them into a prompt."""

    messages: tuple[Mapping[str, str], ...]


Prompt = str | tuple[int, ...] | Conversation
"""Text, token ids, or a conversation that the model is to go on with."""


#: A bound for requests that name none: an engine that answers one request at a time must come to an end.
DEFAULT_MAX_TOKENS = 1024


@dataclass(frozen=True, slots=True)
class VersionBounds:
    """The versions that may answer a request: those from `lowest` on, or `pinned` alone. None: any."""

    lowest: int | None = None
    pinned: int | None = None

    @property
    def accept_all(self) -> bool:
        """Returns whether any version may answer."""
        return self.lowest is None and self.pinned is None

    def accept(self, version: int | None) -> bool:
        """Returns whether the version may answer. None, no version, never may."""
        is_enough = version is not None and (self.lowest is None or version >= self.lowest)
        return is_enough and self.pinned in (None, version)

    def require(self, version: int | None) -> int:
        """Returns the version that is served if it may answer. VersionNotServedError if not, or if none is served.

        ApplyError when none is served and any may answer. For use inside the request barrier.
        """
        if version is None and self.accept_all:
            raise ApplyError("no checked version is loaded: retry after the next refresh", version=None)
        if version is None or not self.accept(version):
            held = "no version" if version is None else f"version {version}"
            wanted = f"at least {self.lowest}" if self.pinned is None else f"{self.pinned}"
            raise VersionNotServedError(
                f"{held} is served here, and the request asks for {wanted}: ask another replica, or send "
                "x-weightline-wait-seconds",
                version=version,
            )
        return version


@dataclass(frozen=True, slots=True)
class Abilities:
    """The properties of an engine's server that a client of rollouts needs to know."""

    logprobs_mode: str | None = None
    """vLLM's name for what logprobs are: `processed_logprobs` are those after temperature and top_p."""
    max_model_len: int | None = None
    """Most tokens of a prompt and its completion together."""
    has_spans: bool = False
    """Whether an answer can name the version of each of its tokens. Without it, an answer has one version."""
    rollout_routes: tuple[str, ...] = ()
    """The routes that answer with token ids and logprobs, the best one first."""


ANY_VERSION, NO_ABILITIES = VersionBounds(), Abilities()


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """Prompts to continue, and the sampling. `temperature` 0 is greedy."""

    prompts: tuple[Prompt, ...]
    max_tokens: int | None
    """Most new tokens. None: as many as the model's positions leave, and no more than DEFAULT_MAX_TOKENS."""
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seeds: tuple[int, ...] | None = None
    """A seed for each prompt. On one version, a seed gives the same samples again. None: seeds that do not repeat."""
    num_samples: int = 1
    """Completions of each prompt."""
    num_top_logprobs: int | None = None
    """None: no logprobs. 0: the drawn tokens' logprobs. More: those of so many most likely tokens a step, too."""
    is_text_wanted: bool = True
    """Whether tokens are decoded. False leaves `Completion.text` empty."""
    bounds: VersionBounds = ANY_VERSION


@dataclass(frozen=True, slots=True)
class Completion:
    """One continuation of a prompt. `length`: cut at max_tokens; `stop`: ended by the model or a stop string."""

    text: str
    finish_reason: Literal["stop", "length"]
    token_ids: tuple[int, ...] = ()
    """The generated tokens, with the token by which the model ended the text."""
    logprobs: tuple[float, ...] | None = None
    """The logprob of each of them in the distribution that it was drawn from: after temperature and top_p."""
    top_logprobs: tuple[Mapping[int, float], ...] = ()
    """For each of them, the most likely tokens at its place with their logprobs."""


@dataclass(frozen=True, slots=True)
class Generation:
    """The completions of a request's prompts, `num_samples` a prompt, in order, all computed on one version."""

    version: int
    completions: tuple[Completion, ...]
    prompts: tuple[tuple[int, ...], ...]
    """The token ids of the prompts."""
    token_texts: Mapping[int, str] = field(default_factory=dict)
    """The text of every token that a logprob belongs to, by its id. Empty without logprobs, or without texts."""

    @property
    def num_prompt_tokens(self) -> int:
        return sum(map(len, self.prompts))


class Decoding(Protocol):
    """Changes that an engine decodes against its own memory and keeps, from its weights to a later state.

    An engine keeps one: the next `begin_decoding`, `load` or `stage` drops it. Errors are those of `Payload` and
    ApplyError.
    """

    @property
    def num_changed(self) -> int:
        """The number of elements that differ from the engine's weights."""
        ...

    @property
    def is_kept(self) -> bool:
        """Whether the engine still keeps the changes, so that they can be staged."""
        ...

    def apply(self, payloads: Sequence[Path], *, is_backward: bool) -> Mapping[str, int]:
        """Decodes the payloads of one step, of all ranks, on top of the steps before. Writes no weights.

        Returns the changes of the digests, by tensor. `is_backward`: from the payloads' version to its base.
        """
        ...

    def discard(self) -> None:
        """Lets the engine drop the changes. Safe to repeat, and after they were staged."""
        ...


class Engine(Protocol):
    """An engine's weights and its request barrier. Errors are ApplyError unless said otherwise.

    `load`, `write_staged`, `undo_staged` and `set_version` are called by one thread at a time, and only between pause
    and resume. `InProcessEngine` implements the staging for engines whose weights lie in this process.
    """

    @property
    def name(self) -> str:
        """The kind of engine, as status and leases show it: `transformers`, `vllm`."""
        ...

    @property
    def version(self) -> int | None:
        """The argument of the last `set_version`."""
        ...

    @property
    def abilities(self) -> Abilities:
        """What clients can ask of this engine's server."""
        ...

    def require_assets(self, sha256_of: Mapping[str, str], meaning_of: Callable[[str], str]) -> None:
        """Checks the small files of the next version, by name, before anything is fetched or paused.

        Files with other bytes may say the same: `meaning_of` returns what `weightline.chain.files.meaning.meaning_of`
        does of a file, which it may have to fetch.

        UnsupportedFeatureError, naming a file, when this engine read another one at its start and does not read it
        again.
        """
        ...

    def load(self, folder: Path) -> None:
        """Replaces model and tokenizer by those of a checkpoint folder. When it raises, the old ones remain."""
        ...

    def specs(self) -> Mapping[str, TensorSpec]:
        """Returns the tensors that the engine holds, tied ones under each of their names. Empty before a load."""
        ...

    def read_bits(self, name: str) -> BitsArray:
        """Returns a tensor's N bits. They may be a view of live weights: read only, and only until the next write."""
        ...

    def read_digests(self) -> dict[str, int]:
        """Returns the digest of every tensor, computed from the engine's memory."""
        ...

    def begin_decoding(self) -> Decoding | None:
        """Returns a decoding from the engine's weights on; None when the caller is to decode from `read_bits`."""
        ...

    def stage(self, changes: Sequence[Changes] | Decoding) -> None:
        """Makes whole-tensor changes ready to be written, while the engine serves. Replaces what was staged before.

        Writes nothing. BaseMismatchError when the engine does not hold the old bits, so that its weights are no longer
        those of its version.
        """
        ...

    def write_staged(self) -> None:
        """Writes the staged changes in place and proves that the memory holds them. Safe to repeat.

        DigestMismatchError when it does not. After an error any part may be written; `undo_staged` restores the old
        state.
        """
        ...

    def undo_staged(self) -> None:
        """Writes the old bits of the staged changes, and proves them as `write_staged` does. Safe to repeat."""
        ...

    def set_version(self, version: int | None) -> None:
        """Sets the version that the weights are proven to be. None means unknown: the engine refuses to generate."""
        ...

    def pause(self, timeout_seconds: float) -> None:
        """Holds new requests back and waits for those in flight. After the timeout it serves on: ApplyError."""
        ...

    def resume(self) -> None:
        """Lets requests through again. Safe to repeat."""
        ...

    def generate(self, request: GenerationRequest) -> Generation:
        """Answers a request.

        InputError when it does not fit the model; ApplyError while no version is loaded; VersionNotServedError when the
        version is outside of the request's bounds.
        """
        ...


class InProcessEngine(ABC):
    """Implements the staging and the proof of `Engine` for weights that lie in this process."""

    _staged: Sequence[Changes] = ()

    @abstractmethod
    def specs(self) -> Mapping[str, TensorSpec]:
        """See `Engine.specs`."""

    @abstractmethod
    def read_bits(self, name: str) -> BitsArray:
        """See `Engine.read_bits`."""

    @abstractmethod
    def read_elements(self, name: str, positions_K: PositionArray) -> BitsArray:
        """Returns a copy of the K bits at the positions."""

    @abstractmethod
    def scatter(self, changes: Sequence[Changes]) -> None:
        """Writes the new bits of whole-tensor changes. Safe to repeat. After an error any part may be written."""

    def read_digests(self) -> dict[str, int]:
        return {name: tensor_digest(whole(spec), self.read_bits(name)) for name, spec in self.specs().items()}

    def begin_decoding(self) -> Decoding | None:
        """Returns None: the weights lie in this process, so the caller decodes from views of them."""
        return None

    def stage(self, changes: Sequence[Changes] | Decoding) -> None:
        assert isinstance(changes, Sequence)
        self._staged = changes

    def write_staged(self) -> None:
        self._write(self._staged)

    def undo_staged(self) -> None:
        self._write([inverse(one) for one in self._staged])

    def _write(self, changes: Sequence[Changes]) -> None:
        """Writes the changes and reads the changed elements back. Time and memory grow with their number.

        The digests after the changes were checked before, so this proves the whole state.
        """
        self.scatter(changes)
        num_threads = num_threads_for(sum(one.num_changed for one in changes))
        for one, is_written in zip(changes, ordered_map(self._is_written, changes, num_threads), strict=True):
            if not is_written:
                name = one.segment.tensor.name
                raise DigestMismatchError(f"{name} did not take the bits that were written", what=name)

    def _is_written(self, changes: Changes) -> bool:
        return np.array_equal(self.read_elements(changes.segment.tensor.name, changes.positions_K), changes.new_K)
