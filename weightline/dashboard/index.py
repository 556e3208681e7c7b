"""An index of one chain, kept in the server process: rows without tensors, refreshed by listing new objects.

A long chain is read newest first, a batch at a time, so that a page can show its newest versions at once.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping
from concurrent.futures import Executor
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from weightline.chain import Chain
from weightline.chain.read.leases import read_leases
from weightline.chain.read.records import EVALUATIONS, LOGGED, REFRESHES
from weightline.dashboard.objects import KeptObjects, fetch_all
from weightline.dashboard.plain import plain_row, text
from weightline.dashboard.records import Document, finite, parse_object, parse_record
from weightline.dashboard.replicas import known_replicas, lease_document
from weightline.dashboard.snapshot import Snapshot
from weightline.errors import ManifestError, WeightlineError
from weightline.format import keys
from weightline.format.header import parse_header
from weightline.format.manifest import Manifest
from weightline.lineage.edges import Shortcut
from weightline.lineage.read import read_shortcuts
from weightline.lineage.rows import LineageRow, row_of, with_records

logger = logging.getLogger(__name__)

#: Manifests that one refresh reads.
BATCH = 200
#: Manifests that the first refresh reads. They are few, so that a page shows something soon.
_FIRST_BATCH = 50
#: A quick refresh looks for new records in this many versions below the tip.
_RECENT = 256
#: One in this many refreshes also reads refs, horizon and shortcuts.
_NAMES_EVERY = 5
#: One in this many refreshes is complete: it also finds expired versions and late records.
_FULL_EVERY = 30


class ChainIndex:
    """Follows one chain. Call `refresh` from one thread at a time; read `snapshot` from any."""

    def __init__(self, chain: Chain, pool: Executor) -> None:
        self.chain = chain
        self.snapshot = Snapshot()
        self._pool = pool
        self._num_refreshes = 0
        self._is_caught_up = False
        self._rows: dict[int, LineageRow] = {}
        self._broken: dict[int, str] = {}
        self._versions: tuple[int, ...] = ()
        self._shortcuts: tuple[Shortcut, ...] = ()
        self._leases: list[Document] = []
        store = chain.store
        self._evaluations = KeptObjects(store, f"{keys.RECORDS}{EVALUATIONS}/", parse_record, pool)
        self._refreshes = KeptObjects(store, f"{keys.RECORDS}{REFRESHES}/", parse_record, pool)
        self._logged = KeptObjects(store, f"{keys.RECORDS}{LOGGED}/", parse_record, pool)
        self._refs = KeptObjects(store, keys.REFS, _parse_plain, pool)
        self._history = KeptObjects(store, keys.HISTORY, _parse_plain, pool)

    def refresh(self) -> bool:
        """Reads the bucket once. Returns whether there is more to read: then call it again at once.

        It never raises. Any error, such as an unreachable bucket, is set in the snapshot, which keeps its other
        content, so that the chain is still followed.
        """
        try:
            has_more = self._look(self._num_refreshes)
        except WeightlineError as error:
            self._report_unreachable(str(error))
            return False
        except Exception as error:
            logger.exception("%s cannot be read", self.chain.url)
            self._report_unreachable(f"{self.chain.url} cannot be read: {error!r}")
            return False
        self._is_caught_up = not has_more
        self._num_refreshes = 0 if has_more else self._num_refreshes + 1
        return has_more

    def report_waiting(self, seconds: float) -> None:
        """Sets in the snapshot that a refresh takes long, since the chain is large or its bucket does not answer."""
        problem = f"{self.chain.url} has not been read for {seconds:.0f} s: its bucket is slow, or does not answer."
        self._publish(replace(self.snapshot, problem=problem))

    def _report_unreachable(self, problem: str) -> None:
        self._publish(replace(self.snapshot, state="unreachable", problem=problem))

    def manifest(self, version: int) -> Manifest:
        """Reads a manifest from the bucket, since the index keeps none. ManifestError, VersionNotFoundError."""
        return Chain(self.chain.store, contents=self.chain.contents).manifest(version)

    def _look(self, number: int) -> bool:
        is_first, is_full = not self._versions, number % _FULL_EVERY == 0
        changed = self._list_versions(is_first or (is_full and self._is_caught_up))
        read_any, has_more = self._read_manifests()
        changed |= read_any or self._broken != self.snapshot.broken
        # While manifests are still being read, only the records of the newest versions are read.
        looks_back = not has_more and (is_full or not self._is_caught_up)
        recent = max(0, (self._versions or (0,))[-1] - _RECENT)
        for kept in (self._evaluations, self._refreshes, self._logged):
            found, more = kept.refresh("" if looks_back else f"{kept.prefix}{keys.padded(recent)}")
            changed, has_more = changed | found, has_more | more
        if is_first or looks_back or number % _NAMES_EVERY == _NAMES_EVERY - 1:
            changed |= self._read_names()
        leases = self._read_leases()
        changed, self._leases = changed | (leases != self._leases), leases
        if changed or self.snapshot.state != "ready" or self.snapshot.problem is not None:
            self._publish(self._take_snapshot())
        return has_more

    def _read_names(self) -> bool:
        """Reads refs, the horizon and shortcuts. Returns whether any changed."""
        before, self._shortcuts = self._shortcuts, read_shortcuts(self.chain)
        return self._refs.refresh()[0] | self._history.refresh()[0] | (before != self._shortcuts)

    def _take_snapshot(self) -> Snapshot:
        evaluations, refreshes = _by_version(self._evaluations.values()), _by_version(self._refreshes.values())
        logged = _by_version(self._logged.values())
        rows = (self._rows[version] for version in sorted(self._rows))
        return Snapshot(
            state="ready",
            versions=self._versions,
            rows=tuple(
                with_records(row, *(found.get(row.version, ()) for found in (evaluations, refreshes, logged)))
                for row in rows
            ),
            broken=dict(self._broken),
            oldest_kept=max((_whole(record, "oldest_kept") for record in self._history.values()), default=0),
            shortcuts=self._shortcuts,
            refs=_current(self._refs.values()),
            evaluations=evaluations,
            refreshes=refreshes,
            logged=logged,
            replicas=known_replicas(self._leases, refreshes),
        )

    def _list_versions(self, is_full: bool) -> bool:
        before = self._versions
        if is_full:
            self._versions = self.chain.versions()
            self._broken.clear()
            present = set(self._versions)
            self._rows = {version: row for version, row in self._rows.items() if version in present}
        else:
            self._versions += self.chain.versions(first=before[-1] + 1)
        return before != self._versions

    def _read_manifests(self) -> tuple[bool, bool]:
        """Reads a batch of manifests, newest first. Returns (whether any was read, whether more are left)."""
        unread = [v for v in reversed(self._versions) if v not in self._rows and v not in self._broken]
        size = BATCH if self._rows else min(BATCH, _FIRST_BATCH)
        wanted = {keys.commit(version): version for version in unread[:size]}
        for key, raw in fetch_all(self.chain.store, wanted, self._pool):
            version = wanted[key]
            try:
                self._rows[version] = _row(key, version, raw)
            except WeightlineError as error:
                self._broken[version] = text(str(error))
            except Exception as error:
                logger.exception("%s of %s cannot be read", key, self.chain.url)
                self._broken[version] = text(f"{key} cannot be read: {error!r}")
        return any(version in self._rows for version in wanted.values()), len(unread) > size

    def _read_leases(self) -> list[Document]:
        """Reads all leases, since they are renewed in place. There are few."""
        now = datetime.now(UTC)
        return [lease_document(held, now) for held in read_leases(self.chain)]

    def _publish(self, snapshot: Snapshot) -> None:
        if snapshot != self.snapshot:
            self.snapshot = replace(snapshot, generation=self.snapshot.generation + 1)


def _row(key: str, version: int, raw: bytes) -> LineageRow:
    """Returns the row of a manifest. ManifestError, UnsupportedFeatureError."""
    parsed = parse_header(raw)
    if parsed.version != version:
        raise ManifestError(f"{key} holds the manifest of version {parsed.version}", rule="version-is-key")
    return plain_row(row_of(parsed))


def _parse_plain(_: str, raw: bytes) -> Document | None:
    return parse_object(raw)


def _by_version(records: Iterable[Document]) -> Mapping[int, list[Document]]:
    found: defaultdict[int, list[Document]] = defaultdict(list)
    for record in records:
        found[record["version"]].append(record)
    return dict(found)


def _current(moves: Iterable[Document]) -> dict[str, int]:
    """Returns the version of every ref after its moves, which come in order."""
    return {text(str(move["name"])): _whole(move, "version") for move in moves if "name" in move}


def _whole(document: Mapping[str, Any], name: str) -> int:
    return int(finite(document.get(name)) or 0)
