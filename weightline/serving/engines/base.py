"""What a replica asks of an inference engine.

The order of a refresh, and no other:
    fetch -> verify -> decode            while the engine serves (`read_bits`)
    pause                                no request runs; those under way have ended on the old version
    withdraw the mark, set_version(None)
    scatter                              changed elements, in place
    check                                `read_elements`
    mark, set_version(N)
    resume                               always, also after a failure: an engine without a version refuses to answer

An engine knows nothing of chains, payloads or digests, and a replica nothing of fused parameters, devices or requests.

Legend: N elements of a tensor, K changed ones. Tensors go by their checkpoint names and are flat (row-major) bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

from weightline.types import BitsArray, Changes, PositionArray, TensorSpec

Prompt = str | tuple[int, ...]
"""Text, or token ids."""


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """What to continue, and how. `temperature` 0 is greedy."""

    prompts: tuple[Prompt, ...]
    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """The continuation of one prompt. `length`: cut at max_tokens; `stop`: the model or a stop string ended it."""

    text: str
    num_tokens: int
    finish_reason: Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Generation:
    """The completions of a request's prompts, in order, all computed on one version."""

    version: int
    completions: tuple[Completion, ...]
    num_prompt_tokens: int


class Engine(Protocol):
    """An engine's weights and its request barrier. Errors are ApplyError unless said otherwise.

    `load`, `scatter` and `set_version` are called by one thread at a time, and only between pause and resume.
    """

    @property
    def name(self) -> str:
        """The kind of engine, for people: `transformers`, `vllm`."""
        ...

    @property
    def version(self) -> int | None:
        """What `set_version` said last."""
        ...

    def require_assets(self, sha256_of: Mapping[str, str]) -> None:
        """Before anything is fetched or paused: the small files of the version to come, by name.

        UnsupportedFeatureError, naming a file, when this engine read another one at its start and reads it no more.
        """
        ...

    def load(self, folder: Path) -> None:
        """Replace model and tokenizer by those of a checkpoint folder. When it raises, what was there remains."""
        ...

    def specs(self) -> Mapping[str, TensorSpec]:
        """The tensors that the engine holds, tied ones under each of their names. Empty before the first load."""
        ...

    def read_bits(self, name: str) -> BitsArray:
        """A tensor's N bits. May be a view of live weights: read only, and only as long as nothing is scattered."""
        ...

    def read_elements(self, name: str, positions_K: PositionArray) -> BitsArray:
        """The bits at some positions."""
        ...

    def scatter(self, changes: Sequence[Changes]) -> None:
        """Write the new bits of whole-tensor Changes in place. Safe to repeat.

        When it raises, any part may be written: scattering the inverse of the same changes restores the old state.
        """
        ...

    def set_version(self, version: int | None) -> None:
        """The version that the weights are proven to be; None: unknown, refuse to generate."""
        ...

    def pause(self, timeout_seconds: float) -> None:
        """Hold new requests back and wait for those under way. ApplyError after the timeout; then it serves on."""
        ...

    def resume(self) -> None:
        """Let requests through again. Safe to repeat."""
        ...

    def generate(self, request: GenerationRequest) -> Generation:
        """Answer. InputError for a request that does not fit the model; ApplyError while no version is loaded."""
        ...


@runtime_checkable
class StagingEngine(Engine, Protocol):
    """An engine whose weights live in other processes. It does there what a replica does itself with one in memory.

    Its `scatter` checks what it wrote: it reads the elements back where they are and adds up the digest changes of all
    parts; DigestMismatchError when either differs.
    """

    def stage(self, changes: Sequence[Changes]) -> None:
        """Before the pause: find where the changed elements live, and check that the engine holds the old bits.

        BaseMismatchError when it does not: then the engine's weights are not what they were proven to be. Writes
        nothing. `scatter` of these very changes, or of their inverse, is then as fast as it can be. Safe to repeat.
        """
        ...

    def read_digests(self) -> dict[str, int]:
        """The digest of every tensor, computed where its parts are."""
        ...
