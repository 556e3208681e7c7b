"""The part of a refresh that needs no pause: plan, fetch, verify, decode, and prove the result before the write."""

from __future__ import annotations

import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from weightline.chain import Chain
from weightline.chain.files.assets import assets_of
from weightline.chain.files.checkpoint import write_checkpoint
from weightline.chain.files.meaning import have_same_meaning
from weightline.chain.replay.diff import tensor_groups
from weightline.chain.replay.fetch import Fetcher, fetching
from weightline.chain.replay.plan import plan_between
from weightline.chain.replay.state import OverlaidState, ReadBits, check_digests, read_state, replay
from weightline.codec.capture import capture_tensors
from weightline.errors import BaseMismatchError, DigestMismatchError, VersionNotFoundError
from weightline.format.manifest import Manifest
from weightline.types import BitsArray, Changes


@dataclass(frozen=True, slots=True, eq=False)
class Held:
    """The proven version that a replica holds. `digests` are those of the engine's weights, by tensor."""

    version: int
    commit_id: str
    digests: dict[str, int]


@dataclass(frozen=True, slots=True)
class PrepareSeconds:
    """Where the time of a preparation went: see `RefreshFacts`. What is missing was taken by its plan."""

    fetch_seconds: float = 0.0
    read_base_seconds: float = 0.0
    decode_seconds: float = 0.0


@dataclass(frozen=True, slots=True, eq=False)
class PreparedDelta:
    """Decoded changes from `held` to the version. The digests after them were checked against the manifest."""

    held: Held
    manifest: Manifest
    changes: tuple[Changes, ...]
    digests: dict[str, int]
    payload_nbytes: int
    seconds: PrepareSeconds = PrepareSeconds()

    @property
    def num_changed(self) -> int:
        return sum(one.num_changed for one in self.changes)


@dataclass(frozen=True, slots=True, eq=False)
class PreparedLoad:
    """A checkpoint folder of the version, for an engine without weights or with another model.

    Call `discard` after use.
    """

    held: Held | None
    manifest: Manifest
    folder: Path
    payload_nbytes: int
    seconds: PrepareSeconds = PrepareSeconds()

    @property
    def num_changed(self) -> int:
        return self.manifest.num_elements

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
    prepared = PreparedLoad(held, chain.manifest(version), folder, plan.payload_nbytes)
    is_written = False
    try:
        write_checkpoint(chain, version, folder)
        is_written = True
    finally:
        if not is_written:
            prepared.discard()
    return prepared


def prepare_delta(chain: Chain, version: int, held: Held, read_bits: ReadBits) -> PreparedDelta:
    """Decodes the changes from the engine's weights to the version. Writes nothing; safe to repeat.

    If the cheapest path starts at an anchor, the version is built in host memory and compared with the weights.

    BaseMismatchError when the bucket's version `held.version` is not the one that the engine holds; DigestMismatchError
    when an object, or the resulting state, differs from the manifests.
    """
    check_base(chain, held)
    manifest = chain.manifest(version)
    started, base = time.perf_counter(), _TimedBase(read_bits)
    with fetching(chain.store) as fetcher:
        pending, plan = replay(
            chain, lambda: OverlaidState(held.version, manifest.specs, dict(held.digests), base.read), version, fetcher
        )
        if plan.hops and plan.hops[0].base_version is None:
            changes, digests = _from_anchor(chain, manifest, base.read, fetcher)
        else:
            changes, digests = tuple(one for one in pending.changes.values() if one.num_changed), pending.digests
        spent = time.perf_counter() - started
        seconds = PrepareSeconds(fetcher.seconds, base.seconds, spent - fetcher.seconds - base.seconds)
    return PreparedDelta(held, manifest, changes, digests, plan.payload_nbytes, seconds)


class _TimedBase:
    """Reads the engine's bits, and counts the seconds that it takes."""

    def __init__(self, read_bits: ReadBits) -> None:
        self._read_bits = read_bits
        self.seconds = 0.0

    def read(self, name: str) -> BitsArray:
        started = time.perf_counter()
        try:
            return self._read_bits(name)
        finally:
            self.seconds += time.perf_counter() - started


def fits_in_place(chain: Chain, version: int, held: Held) -> bool:
    """Returns whether the version has the same tensors and small files (config, tokenizer) as the held one."""
    if chain.manifest(held.version).specs != chain.manifest(version).specs:
        return False
    return have_same_meaning(chain.store, assets_of(chain, held.version), assets_of(chain, version))


def check_base(chain: Chain, held: Held) -> None:
    """Compares the held version with the bucket's, by commit and by every digest. Reads the bucket, not the cache."""
    try:
        base = Chain(chain.store, chain.trusted).manifest(held.version)
    except VersionNotFoundError as error:
        raise _base_mismatch(chain, held, "that version is gone") from error
    if base.commit_id != held.commit_id:
        raise _base_mismatch(chain, held, f"the chain has commit {base.commit_id}, the replica {held.commit_id}")
    try:
        check_digests(held.digests, base)
    except DigestMismatchError as error:
        raise _base_mismatch(chain, held, f"the digest of tensor {error.facts['what']} differs") from error


def _base_mismatch(chain: Chain, held: Held, why: str) -> BaseMismatchError:
    return BaseMismatchError(
        f"the replica's weights are not version {held.version} of {chain.url}: {why}. Restart the replica with an "
        "empty state folder to load from an anchor",
        version=held.version,
    )


def _from_anchor(
    chain: Chain, manifest: Manifest, read_bits: ReadBits, fetcher: Fetcher
) -> tuple[tuple[Changes, ...], dict[str, int]]:
    """Returns the changes that lead to the version, and its digests.

    Builds the version from an anchor, a group of tensors at a time, and compares it with the engine's weights.
    """
    changes: list[Changes] = []
    digests: dict[str, int] = {}
    for names in tensor_groups(manifest.specs.values()):
        state = read_state(chain, manifest.version, names.__contains__, fetcher)
        held_bits = {name: read_bits(name) for name in state.specs}
        changes += capture_tensors(state.specs.values(), held_bits, state.bits)
        digests |= state.digests
    return tuple(changes), digests
