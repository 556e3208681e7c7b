"""Writes the payloads of a version from one process, a bounded group of tensors at a time, and commits it.

Each group of `spec_groups` is a payload. Within it, states are held for a part of the group at a time, so that memory
does not grow with payloads; tiles are compared and coded on all CPUs.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import chain, groupby
from pathlib import Path
from types import TracebackType
from typing import Self

from weightline.chain.files.source import Tile
from weightline.chain.read.history import Chain
from weightline.chain.replay.diff import STATE_NBYTES, spec_groups
from weightline.chain.replay.fetch import fetching
from weightline.chain.write.commit import commit_manifest
from weightline.chain.write.draft import Authorship, Draft, uploading
from weightline.codec.capture import capture
from weightline.codec.changes import join_tiles
from weightline.codec.coding import coding_named, num_cpus, ordered_map_in_batches
from weightline.codec.digest import add_digests, digest_change, format_digest
from weightline.errors import DigestMismatchError
from weightline.format.manifest import Manifest
from weightline.format.write_payload import PayloadInfo, write_delta
from weightline.types import Changes, TensorSpec, whole

#: Returns the digests of those of these tensors that are known before the tensors are compared.
Known = Callable[[Sequence[TensorSpec]], Mapping[str, int]]
#: Yields the old and the new tile, of all tiles of some tensors, which take at most STATE_NBYTES or are one tensor.
Pairs = Callable[[Sequence[TensorSpec]], Iterator[tuple[Tile, Tile]]]


class VersionWriter:
    """Uploads the payloads of one version while the block lasts. `commit` then makes the version exist.

    An error or a crash before that leaves orphaned payloads, which gc removes.
    """

    def __init__(self, history: Chain, version: int) -> None:
        self._chain = history
        self._draft = Draft(version)
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="weightline-")))
            self.fetcher = stack.enter_context(fetching(self._chain.store))
            self._uploads = stack.enter_context(uploading(self._chain.store))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, traceback)

    def put(self, write: Callable[[Path], PayloadInfo]) -> None:
        """Lets `write` write a payload's file, and starts its upload."""
        rank = len(self._draft.payloads)
        path = self._folder / f"payload-{rank}.safetensors"
        info = write(path)
        self._uploads.start(self._draft.key(rank), path)
        self._draft.add(rank, info.nbytes, info.sha256, info.num_changed)

    def put_deltas(
        self, specs: Sequence[TensorSpec], before: Mapping[str, int], known: Known, pairs: Pairs, coding: str
    ) -> dict[str, int]:
        """Writes the deltas from the tip to another state, and returns the digests of that state's tensors.

        `specs`: all tensors, in the order of payloads. `before`: the tip's digests; tensors that are known to have
        them are not compared. DigestMismatchError when the tiles do not
        lead to the digests that are known, as when a file changes while it is read.
        """
        digests = dict(before)
        captured = _Captured(digests, known, pairs, is_ranked=coding_named(coding).ranked)
        for group in spec_groups(specs):
            changes = captured(group)
            first = next(changes, None)
            if first is not None:
                every = chain((first,), changes)
                self.put(partial(write_delta, changes=every, coding=coding, num_threads=num_cpus()))
        return digests

    def commit(self, author: Authorship, specs: Mapping[str, TensorSpec], digests: Mapping[str, int]) -> Manifest:
        """Commits the version, after the block, by the payloads that were put."""
        manifest = self._draft.manifest(author, specs, digests, world_size=max(1, len(self._draft.payloads)))
        return commit_manifest(self._chain, manifest)


@dataclass(frozen=True, slots=True)
class _Captured:
    """Captures the changes of groups of tensors, and moves `digests` along with them."""

    digests: dict[str, int]
    known: Known
    pairs: Pairs
    is_ranked: bool

    def __call__(self, group: Sequence[TensorSpec]) -> Iterator[Changes]:
        """Yields the changes of every tensor that has any, in order."""
        # A part's tiles are all compared before the next part's states are read, so that two states are held at most.
        for part in spec_groups(group, STATE_NBYTES):
            known = self.known(part)
            differing = [spec for spec in part if known.get(spec.name) != self.digests[spec.name]]
            pairs = self.pairs(differing) if differing else iter(())
            tiles = ordered_map_in_batches(self._compare, pairs, num_cpus(), size_of=lambda pair: pair[0][0].length)
            for tensor, found in groupby(tiles, key=lambda changes: changes.segment.tensor):
                changed = [changes for changes in found if changes.num_changed]
                if changed:
                    joined = join_tiles(whole(tensor), changed)
                    self.digests[tensor.name] = add_digests(self.digests[tensor.name], digest_change(joined))
                    yield joined
            self._check(known)

    def _compare(self, pair: tuple[Tile, Tile]) -> Changes:
        (tile, old_N), (_, new_N) = pair
        return capture(tile, old_N, new_N, ranked=self.is_ranked)

    def _check(self, known: Mapping[str, int]) -> None:
        for name, digest in known.items():
            if self.digests[name] != digest:
                expected, actual = format_digest(digest), format_digest(self.digests[name])
                raise DigestMismatchError(
                    f"tensor {name} was read twice, with digest {expected} and then {actual}: its weights changed "
                    "meanwhile. Commit again when they are whole",
                    what=name, expected=expected, actual=actual,
                )  # fmt: skip
