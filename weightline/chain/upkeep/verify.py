"""Checks the invariants of docs/design.md that are observable from the bucket. Each violation becomes a finding.

Reads only. Objects that no kept version needs are skipped, since gc may delete them at any moment. Deep verification
reads every kept object and replays every hop into every kept version, a bounded group of tensors at a time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise

from weightline.chain.read.history import Chain
from weightline.chain.read.records import EVALUATIONS, LOGGED, REFRESHES, SAMPLES, read_records
from weightline.chain.read.refs import Ref, newest_moves, oldest_kept, read_move
from weightline.chain.replay.diff import GROUP_NBYTES
from weightline.chain.replay.plan import Ways
from weightline.chain.upkeep.retention import Kept, read_kept
from weightline.chain.upkeep.verify_objects import (
    CONTENTS,
    NamedObject,
    content_findings,
    named_objects,
    object_findings,
)
from weightline.chain.upkeep.verify_replay import Finding, Progress, noting, replay_findings
from weightline.errors import VersionNotFoundError
from weightline.format import keys
from weightline.format.header import HeaderV2
from weightline.format.manifest import Header
from weightline.format.shortcut import Shortcut

__all__ = ["Finding", "VerifyReport", "verify_chain"]


#: No bound: a verification holds all headers from its beginning to its end.
_ALL_HEADERS_NBYTES = 1 << 40


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """The extent and the findings of a verification."""

    chain: str
    commit_mode: str
    """The mechanism that makes commits exclusive: see docs/buckets.md."""
    num_versions: int
    num_shortcuts: int
    num_objects: int
    is_deep: bool
    findings: tuple[Finding, ...]

    @property
    def holds(self) -> bool:
        return not self.findings


def verify_chain(
    chain: Chain, *, is_deep: bool = True, group_nbytes: int = GROUP_NBYTES, progress: Progress | None = None
) -> VerifyReport:
    """Checks the chain and returns the findings. StorageError only when the bucket cannot be read at all.

    Nothing is replayed when headers, objects or refs already have findings.
    """
    findings: list[Finding] = []
    # It reads what the bucket holds now, not what this process has read before, and each header once.
    chain = Chain(chain.store, chain.trusted, max_headers_nbytes=_ALL_HEADERS_NBYTES)
    seen = _look(chain, findings)
    num_versions = num_shortcuts = num_objects = 0
    if seen is not None:
        objects = seen.objects(chain, findings)
        num_versions, num_shortcuts, num_objects = len(seen.headers), len(seen.shortcuts), len(objects)
        findings += object_findings(chain, objects)
        if is_deep and seen.headers and not findings:
            findings += _deep_findings(chain, seen, group_nbytes, progress)
    findings += (Finding(contest.kind, contest.key, contest.message) for contest in chain.store.contests())
    return VerifyReport(
        chain.url, chain.store.commit_mode, num_versions, num_shortcuts, num_objects, is_deep, tuple(findings)
    )


def _deep_findings(chain: Chain, seen: _Seen, group_nbytes: int, progress: Progress | None) -> Iterator[Finding]:
    replayed = [h for h in seen.headers if h.version in seen.kept.versions - seen.kept.bearers]
    shortcuts = [s for s in seen.shortcuts if seen.replays(s)]
    found = list(content_findings(chain, seen.kept_headers()))
    yield from found
    if any(finding.rule == CONTENTS for finding in found):
        return  # without layouts and digests states cannot be compared
    yield from replay_findings(chain, replayed, shortcuts, seen.ways, group_nbytes=group_nbytes, progress=progress)


@dataclass(frozen=True, slots=True)
class _Seen:
    """The parts of the chain that could be read."""

    headers: tuple[Header, ...]
    """Oldest first."""
    shortcuts: tuple[Shortcut, ...]
    ways: Ways
    kept: Kept

    def kept_headers(self) -> list[Header]:
        return [header for header in self.headers if header.version in self.kept.versions]

    def objects(self, chain: Chain, findings: list[Finding]) -> dict[str, NamedObject]:
        """Returns the objects that kept versions and shortcuts need, by key."""
        found: dict[str, NamedObject] = {}
        for shortcut in filter(self.kept.keeps_shortcut, self.shortcuts):
            found |= {ref.key: NamedObject(ref.nbytes, shortcut.key) for ref in shortcut.payloads}
        for header in self.kept_headers():
            found |= named_objects(chain, header, findings)
        return found

    def replays(self, shortcut: Shortcut) -> bool:
        return self.kept.keeps_shortcut(shortcut) and shortcut.base_version not in self.kept.bearers


def _look(chain: Chain, findings: list[Finding]) -> _Seen | None:
    """Reads horizon, refs, records, headers and shortcuts, each object once.

    What names versions is read before headers, since a writer may add versions meanwhile.
    """
    horizon = -1
    with noting(findings, "horizon", keys.HISTORY):
        horizon = oldest_kept(chain)
    if findings:
        return None  # all other checks depend on the horizon
    refs = _refs(chain, findings)
    recorded = list(_recorded_versions(chain, findings))
    headers = tuple(_parsed_headers(chain, findings))
    ways = Ways(chain)
    shortcuts = tuple(_parsed_shortcuts(ways, headers, findings))
    findings += _history_findings(chain, headers, horizon)
    findings += _pointer_findings(headers, refs, recorded)
    return _Seen(headers, shortcuts, ways, _kept(chain, headers, refs, ways, horizon, findings))


def _kept(
    chain: Chain, headers: Sequence[Header], refs: Sequence[Ref], ways: Ways, horizon: int, findings: list[Finding]
) -> Kept:
    kept = Kept(frozenset(header.version for header in headers if header.version >= horizon))
    if findings:
        return kept  # replay cannot be planned for a chain that cannot be read
    with noting(findings, "kept", chain.url):
        kept = read_kept(chain, headers, refs, ways, horizon)
    findings += (Finding("unreachable", f"version {v}", str(error)) for v, error in kept.unreachable.items())
    return kept


def _refs(chain: Chain, findings: list[Finding]) -> list[Ref]:
    found: list[Ref] = []
    newest: tuple[str, ...] = ()
    with noting(findings, "ref", keys.REFS):
        newest = newest_moves(chain)
    for key in newest:
        with noting(findings, "ref", key, key):
            found.append(read_move(chain, key))
    return found


def _recorded_versions(chain: Chain, findings: list[Finding]) -> Iterator[tuple[str, int]]:
    for kind in (EVALUATIONS, REFRESHES, LOGGED, SAMPLES):
        with noting(findings, "record", f"{keys.RECORDS}{kind}/"):
            yield from [(kind, record["version"]) for record in read_records(chain, kind)]


def _parsed_headers(chain: Chain, findings: list[Finding]) -> Iterator[Header]:
    for info in chain.store.list(keys.COMMITS):
        version = keys.version_of_commit(info.key)
        if version is None:
            findings.append(Finding("commit-key", info.key, "is not the key of a version"))
            continue
        # A version behind the horizon may be collected meanwhile. A missing kept version is a finding further below.
        with noting(findings, "manifest", info.key), suppress(VersionNotFoundError):
            yield chain.header(version)


def _parsed_shortcuts(ways: Ways, headers: Sequence[Header], findings: list[Finding]) -> Iterator[Shortcut]:
    commit_ids = {header.version: header.commit_id for header in headers}
    for header in headers:
        for shortcut in ways.shortcuts_into(header.version):
            base_id = commit_ids.get(-1 if shortcut.base_version is None else shortcut.base_version)
            if shortcut.commit_id == header.commit_id and base_id in (None, shortcut.base_commit_id):
                yield shortcut
            else:
                message = "starts or ends at a commit that is not in the chain: readers ignore it"
                findings.append(Finding("shortcut-commit", shortcut.key, message, shortcut.key))
    for key, passed_over in ways.passed_over.items():
        with noting(findings, "shortcut", key, key):
            raise passed_over


def _history_findings(chain: Chain, headers: Sequence[Header], horizon: int) -> Iterator[Finding]:
    tip = headers[-1].version if headers else None
    if (tip is None and horizon > 0) or (tip is not None and horizon > tip):
        there = "the chain holds no version" if tip is None else f"the tip is {tip}"
        yield Finding("horizon", keys.HISTORY, f"keeps nothing before {horizon}: {there}")
    kept = [horizon - 1, *(header.version for header in headers if header.version >= horizon)]
    for before, after in pairwise(kept):
        if after - before == 2:
            yield Finding("contiguous", keys.commit(before + 1), "is missing between kept versions")
        elif after - before > 2:
            message = f"is missing between kept versions, and so are those up to {after - 1}"
            yield Finding("contiguous", keys.commit(before + 1), message)
    for commit_id, count in Counter(header.commit_id for header in headers).items():
        if count > 1:
            yield Finding("commit-id", commit_id, f"is in {count} manifests")
    bases = [header.base_model for header in headers if header.base_model is not None]
    for header in headers:
        if bases and header.base_model not in (None, bases[0]):
            yield Finding("base-model", header.key, "is an adapter of another base model than the chain's")
        if len({payload.key for payload in header.payloads}) != len(header.payloads):
            yield Finding("payload-keys", header.key, "names a payload twice")
    yield from _revert_findings(chain, headers)


def _revert_findings(chain: Chain, headers: Sequence[Header]) -> Iterator[Finding]:
    by_version = {header.version: header for header in headers}
    findings: list[Finding] = []
    for header in headers:
        earlier = None if header.reverts_to is None else by_version.get(header.reverts_to)
        with noting(findings, "revert", header.key, header.key):
            if earlier is not None and not _have_same_state(chain, earlier, header):
                findings.append(Finding("revert", header.key, f"is not the state of version {earlier.version}"))
    yield from findings


def _have_same_state(chain: Chain, one: Header, other: Header) -> bool:
    """Compares the roots of two headers that name one layout; else the digests of all tensors."""
    if isinstance(one, HeaderV2) and isinstance(other, HeaderV2) and one.layout == other.layout:
        return one.root == other.root
    return chain.digests(one.version) == chain.digests(other.version)


def _pointer_findings(
    headers: Sequence[Header], refs: Sequence[Ref], recorded: Sequence[tuple[str, int]]
) -> Iterator[Finding]:
    commit_ids = {header.version: header.commit_id for header in headers}
    for ref in refs:
        if commit_ids.get(ref.version) != ref.commit_id:
            message = f"names version {ref.version}, commit {ref.commit_id}, which is missing"
            yield Finding("ref", ref.name, message, keys.ref(ref.name, ref.number))
    for kind, version in recorded:
        if headers and version > headers[-1].version:
            yield Finding("record", f"{kind}/{version}", "names a version that does not exist")
