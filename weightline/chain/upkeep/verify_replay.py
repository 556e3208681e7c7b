"""Deep verification: reads every kept byte without caches, and replays every hop into every kept version.

Works through a bounded group of tensors at a time. Fetched objects stay in a temporary folder until the end.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from weightline.chain.read.history import Chain
from weightline.chain.replay.diff import tensor_groups
from weightline.chain.replay.fetch import Fetcher, fetching
from weightline.chain.replay.plan import Hop, Ways, hop_of, hop_of_shortcut
from weightline.chain.replay.state import HostState, advance_state, apply_hop
from weightline.errors import (
    CorruptError,
    NotFoundError,
    SignatureError,
    StorageError,
    TransientStorageError,
    UnsupportedFeatureError,
)
from weightline.format.manifest import Header
from weightline.format.shortcut import Shortcut

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Finding:
    """A violation of a rule."""

    rule: str
    subject: str
    message: str
    key: str | None = None
    """The object that breaks it: a manifest, a shortcut or a move of a ref. None where the fault may be elsewhere."""


@contextmanager
def noting(findings: list[Finding], rule: str, subject: str, key: str | None = None) -> Iterator[None]:
    """Turns an error of the block into a finding. TransientStorageError is raised, since the bucket is unavailable.

    `key`: the object that is to blame when its bytes, or those that it names, are wrong or missing.
    """
    try:
        yield
    except TransientStorageError:
        raise
    except SignatureError as error:
        findings.append(Finding("signature", subject, str(error)))
    except (CorruptError, NotFoundError) as error:
        findings.append(Finding(rule, subject, str(error), key))
    except (UnsupportedFeatureError, StorageError) as error:
        findings.append(Finding(rule, subject, str(error)))


def replay_findings(
    chain: Chain,
    headers: Sequence[Header],
    shortcuts: Sequence[Shortcut],
    ways: Ways,
    *,
    group_nbytes: int,
    progress: Progress | None,
) -> Iterator[Finding]:
    """Yields a finding for each hop into these versions that gives another state, or contradicts its header.

    `headers` come oldest first.
    """
    groups = list(tensor_groups(chain.layout(headers[-1].version).specs, group_nbytes))
    findings: dict[str, Finding] = {}
    into: defaultdict[int, list[Shortcut]] = defaultdict(list)
    for shortcut in shortcuts:
        into[shortcut.version].append(shortcut)
    with fetching(chain.store, is_cached=False) as fetcher:
        for number, names in enumerate(groups):
            walk = _Walk(chain, ways, fetcher, names)
            for count, header in enumerate(headers, 1):
                walk.into(header, into[header.version])
                if progress is not None:
                    progress(number * len(headers) + count, len(groups) * len(headers))
            for finding in walk.findings:
                findings.setdefault(finding.subject, finding)
        yield from findings.values()
        paths: tuple[Header | Shortcut, ...] = (*headers, *shortcuts)
        for way in paths:
            if _subject(way) not in findings:
                yield from _fact_findings(way, fetcher)


@dataclass(slots=True)
class _Walk:
    """Replays a group of tensors through the kept versions, oldest first."""

    chain: Chain
    ways: Ways
    fetcher: Fetcher
    names: frozenset[str]
    findings: list[Finding] = field(default_factory=list)
    _state: HostState = field(default_factory=HostState)
    _unreached: set[int] = field(default_factory=set)

    def into(self, header: Header, shortcuts: Sequence[Shortcut]) -> None:
        """Replays the version's shortcuts on states of their own, then moves to the version by its own payloads."""
        for shortcut in shortcuts:
            with noting(self.findings, "replay", _subject(shortcut)):
                self._try(hop_of_shortcut(shortcut))
        if header.base_version in self._unreached:
            self._unreached.add(header.version)  # the finding of its base is the cause
            return
        with noting(self.findings, "replay", _subject(header)):
            self._move(header)
        if self._state.version != header.version:
            self._unreached.add(header.version)

    def _try(self, hop: Hop) -> None:
        state = HostState()
        if hop.base_version is not None:
            advance_state(self.chain, state, hop.base_version, self._selects, self.fetcher, self.ways)
        subject = (
            f"version {hop.version} from {'nothing' if hop.base_version is None else f'version {hop.base_version}'}"
        )
        with noting(self.findings, "replay", subject, hop.shortcut_key):
            apply_hop(self.chain, state, hop, self.fetcher, self._selects)

    def _move(self, header: Header) -> None:
        """Moves the state to the version, by the cheapest path from nothing when the base is not kept.

        After an error the state has no version.
        """
        own, state = hop_of(header), self._state
        self._state = HostState()
        if own.base_version is None or own.base_version == state.version:
            apply_hop(self.chain, state, own, self.fetcher, self._selects)
        else:
            state = HostState()
            advance_state(self.chain, state, header.version, self._selects, self.fetcher, self.ways)
        self._state = state

    def _selects(self, name: str) -> bool:
        return name in self.names


def _fact_findings(way: Header | Shortcut, fetcher: Fetcher) -> Iterator[Finding]:
    """Yields a finding when a header's kind, coding or count differs from its payloads'. Readers plan by them."""
    findings: list[Finding] = []
    with noting(findings, "payload", _subject(way)):
        payloads = [fetcher.open(ref) for ref in way.payloads]
        expected = ("anchor" if way.base_version is None else "delta", way.coding)
        for kind, coding in sorted({(payload.kind, payload.coding) for payload in payloads} - {expected}):
            findings.append(_contradiction(way, f"{expected[0]} coded {expected[1]}", f"{kind} coded {coding}"))
        num_changed = sum(payload.num_changed for payload in payloads)
        if num_changed != way.num_changed:
            findings.append(_contradiction(way, f"{way.num_changed} changed elements", f"{num_changed}"))
    yield from findings


def _contradiction(way: Header | Shortcut, says: str, has: str) -> Finding:
    return Finding("payload-facts", way.key, f"says {says}, its payloads: {has}")


def _subject(way: Header | Shortcut) -> str:
    return f"version {way.version} from {'nothing' if way.base_version is None else f'version {way.base_version}'}"
