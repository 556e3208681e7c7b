"""The part of a refresh that needs no pause: plan, fetch, verify, decode, and prove the result before the write."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from weightline.chain import Chain
from weightline.chain.files.assets import assets_of
from weightline.chain.files.checkpoint import write_checkpoint
from weightline.chain.files.meaning import have_same_meaning
from weightline.chain.replay.diff import tensor_groups
from weightline.chain.replay.fetch import Fetcher, fetching
from weightline.chain.replay.plan import plan_between
from weightline.chain.replay.state import OverlaidState, ReplayState, check_digests, read_state, replay
from weightline.codec.capture import capture_tensors
from weightline.codec.digest import add_digests
from weightline.errors import BaseMismatchError, DigestMismatchError, VersionNotFoundError
from weightline.format.manifest import Header
from weightline.format.payload import Payload
from weightline.format.state_digests import StateDigests
from weightline.format.tensor_layout import Layout
from weightline.serving.engines.base import Decoding, Engine
from weightline.types import BitsArray, Changes, Segment, TensorSpec


@dataclass(frozen=True, slots=True, eq=False)
class Held:
    """The proven version that a replica holds. `digests` are those of the engine's weights, by tensor."""

    version: int
    commit_id: str
    digests: StateDigests


@dataclass(frozen=True, slots=True)
class PrepareSeconds:
    """Where the time of a preparation went: see `RefreshFacts`. What is missing was taken by its plan."""

    fetch_seconds: float = 0.0
    read_base_seconds: float = 0.0
    decode_seconds: float = 0.0


@dataclass(frozen=True, slots=True, eq=False)
class PreparedDelta:
    """Decoded changes from `held` to the version. The digests after them were checked against the header.

    changes: those of each tensor, or the engine's own decoding, which it keeps. Call `discard` after use.
    """

    held: Held
    header: Header
    changes: tuple[Changes, ...] | Decoding
    digests: StateDigests
    payload_nbytes: int
    seconds: PrepareSeconds = PrepareSeconds()

    @property
    def num_changed(self) -> int:
        if isinstance(self.changes, tuple):
            return sum(one.num_changed for one in self.changes)
        return self.changes.num_changed

    @property
    def is_kept(self) -> bool:
        """Returns whether the changes can still be applied. An engine keeps no more than one decoding."""
        return isinstance(self.changes, tuple) or self.changes.is_kept

    def discard(self) -> None:
        """Lets the engine drop what it decoded. Safe to repeat."""
        if not isinstance(self.changes, tuple):
            self.changes.discard()


@dataclass(frozen=True, slots=True, eq=False)
class PreparedLoad:
    """A checkpoint folder of the version, for an engine without weights or with another model.

    Call `discard` after use.
    """

    held: Held | None
    header: Header
    folder: Path
    payload_nbytes: int
    seconds: PrepareSeconds = PrepareSeconds()

    @property
    def num_changed(self) -> int:
        return self.header.num_elements

    def discard(self) -> None:
        """Removes the folder. Safe to repeat."""
        shutil.rmtree(self.folder, ignore_errors=True)


Prepared = PreparedDelta | PreparedLoad

_LOADING = "loading-"


def remove_leftovers(state_dir: Path) -> None:
    """Removes the checkpoint folders that a crash left."""
    for folder in state_dir.glob(f"{_LOADING}*"):
        shutil.rmtree(folder, ignore_errors=True)


def prepare_load(chain: Chain, version: int, state_dir: Path, held: Held | None = None) -> PreparedLoad:
    """Writes the version as a checkpoint below `state_dir`. A crash leaves a folder for `remove_leftovers`."""
    plan = plan_between(chain, None, version)
    folder = Path(tempfile.mkdtemp(prefix=_LOADING, dir=state_dir))
    prepared = PreparedLoad(held, chain.header(version), folder, plan.payload_nbytes)
    is_written = False
    try:
        write_checkpoint(chain, version, folder)
        is_written = True
    finally:
        if not is_written:
            prepared.discard()
    return prepared


@dataclass(slots=True)
class EngineState(ReplayState):
    """A state that an engine decodes against its own memory, so that no bits pass between the two."""

    version: int
    specs: dict[str, TensorSpec]
    digests: StateDigests
    decoding: Decoding

    def apply_payloads(
        self, payloads: Iterable[Payload], specs: Mapping[str, TensorSpec], *, is_backward: bool
    ) -> None:
        opened = list(payloads)
        for payload in opened:
            self.require_known(payload, specs)
        for name, digest in self.decoding.apply([one.path for one in opened], is_backward=is_backward).items():
            self.digests[name] = add_digests(self.digests[name], digest)


def prepare_delta(chain: Chain, version: int, held: Held, engine: Engine) -> PreparedDelta:
    """Decodes the changes from the engine's weights to the version. Writes nothing; safe to repeat.

    If the cheapest path starts at an anchor, the version is built in host memory and compared with the weights.

    BaseMismatchError when the bucket's version `held.version` is not the one that the engine holds; DigestMismatchError
    when an object, or the resulting state, differs from the manifests.
    """
    check_base(chain, held)
    header, layout = chain.header(version), chain.layout(version)
    started, base = time.perf_counter(), _TimedBase(engine)
    with fetching(chain.store) as fetcher, ExitStack() as after_error:

        def begin() -> EngineState | OverlaidState:
            decoding = engine.begin_decoding()
            if decoding is None:
                return OverlaidState(held.version, layout.by_name, held.digests.copy(), base.read_segment)
            after_error.callback(decoding.discard)
            return EngineState(held.version, layout.by_name, held.digests.copy(), decoding)

        changes: tuple[Changes, ...] | Decoding
        pending, plan = replay(chain, begin, version, fetcher)
        digests = StateDigests.of(layout, pending.digests)
        if plan.hops and plan.hops[0].base_version is None:
            changes, digests = _from_anchor(chain, version, layout, base.read, fetcher)
        elif isinstance(pending, EngineState):
            changes = pending.decoding
            after_error.pop_all()
        else:
            changes = tuple(one for one in pending.changes.values() if one.num_changed)
        spent = time.perf_counter() - started
        seconds = PrepareSeconds(fetcher.seconds, base.seconds, max(0.0, spent - fetcher.seconds - base.seconds))
    return PreparedDelta(held, header, changes, digests, plan.payload_nbytes, seconds)


class _TimedBase:
    """Reads the engine's bits, and counts the seconds that it takes."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.seconds = 0.0

    def read(self, name: str) -> BitsArray:
        started = time.perf_counter()
        try:
            return self._engine.read_bits(name)
        finally:
            self.seconds += time.perf_counter() - started

    def read_segment(self, segment: Segment) -> BitsArray:
        return self.read(segment.tensor.name)[segment.start : segment.stop]


def fits_in_place(chain: Chain, version: int, held: Held) -> bool:
    """Returns whether the version has the same tensors and small files (config, tokenizer) as the held one."""
    if chain.layout(held.version) != chain.layout(version):
        return False
    return have_same_meaning(chain.store, assets_of(chain, held.version), assets_of(chain, version))


def check_base(chain: Chain, held: Held) -> None:
    """Compares the held version with the bucket's, by commit and by every digest. Reads the bucket, not the cache."""
    present = chain.reopened()
    try:
        base = present.header(held.version)
    except VersionNotFoundError as error:
        raise _base_mismatch(chain, held, "that version is gone") from error
    if base.commit_id != held.commit_id:
        raise _base_mismatch(chain, held, f"the chain has commit {base.commit_id}, the replica {held.commit_id}")
    try:
        check_digests(held.digests, present, held.version)
    except DigestMismatchError as error:
        raise _base_mismatch(chain, held, f"the digest of tensor {error.facts['what']} differs") from error


def _base_mismatch(chain: Chain, held: Held, why: str) -> BaseMismatchError:
    return BaseMismatchError(
        f"the replica's weights are not version {held.version} of {chain.url}: {why}. Restart the replica with an "
        "empty state folder to load from an anchor",
        version=held.version,
    )


def _from_anchor(
    chain: Chain, version: int, layout: Layout, read_bits: Callable[[str], BitsArray], fetcher: Fetcher
) -> tuple[tuple[Changes, ...], StateDigests]:
    """Returns the changes that lead to the version, and its digests.

    Builds the version from an anchor, a group of tensors at a time, and compares it with the engine's weights.
    """
    changes: list[Changes] = []
    digests = StateDigests.zeros(layout)
    for names in tensor_groups(layout.specs):
        state = read_state(chain, version, names.__contains__, fetcher)
        held_bits = {name: read_bits(name) for name in state.specs}
        changes += capture_tensors(state.specs.values(), held_bits, state.bits)
        for name in state.digests:
            digests[name] = state.digests[name]
    return tuple(changes), digests
