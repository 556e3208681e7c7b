"""Everything that can be seen to hold in a bucket: the invariants of docs/design.md, as findings rather than errors.

Reads only. Deep verification replays every kept version and every shortcut, a bounded group of tensors at a time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from weightline.chain.fetch import Fetcher, fetching
from weightline.chain.groups import GROUP_NBYTES, tensor_groups
from weightline.chain.history import Chain
from weightline.chain.horizon import oldest_kept
from weightline.chain.plan import Hop
from weightline.chain.records import EVALUATIONS, REFRESHES, read_records
from weightline.chain.refs import current_refs
from weightline.chain.state import HostState, advance_state, apply_hop
from weightline.chain.ways import Ways, hop_of, hop_of_shortcut
from weightline.errors import (
    CorruptError,
    NotFoundError,
    SignatureError,
    StorageError,
    UnsupportedFeatureError,
    WeightlineError,
)
from weightline.format import keys
from weightline.format.manifest import Manifest, StoredObject
from weightline.format.shortcut import Shortcut
from weightline.store.contests import commit_mode, contests


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that does not hold."""

    rule: str
    subject: str
    message: str


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What was looked at and what was found."""

    chain: str
    commit_mode: str
    """What makes one of several racing writers win: docs/buckets.md."""
    num_versions: int
    num_shortcuts: int
    num_objects: int
    is_deep: bool
    findings: tuple[Finding, ...]

    @property
    def holds(self) -> bool:
        return not self.findings


Progress = Callable[[int, int], None]


def verify_chain(
    chain: Chain, *, is_deep: bool = True, group_nbytes: int = GROUP_NBYTES, progress: Progress | None = None
) -> VerifyReport:
    """Check the chain. StorageError only when the bucket cannot be read at all; what is wrong becomes a finding."""
    findings: list[Finding] = []
    manifests = list(_parsed_manifests(chain, findings))
    shortcuts = list(_parsed_shortcuts(chain, manifests, findings))
    findings += _history_findings(chain, manifests)
    objects = {ref.key: ref for m in manifests if m.version >= oldest_kept(chain) for ref in (*m.payloads, *m.assets)}
    objects |= {ref.key: ref for s in shortcuts for ref in s.payloads}
    findings += _object_findings(chain, objects)
    findings += _pointer_findings(chain, manifests)
    if is_deep and manifests and not findings:
        findings += _replay_findings(chain, manifests, shortcuts, group_nbytes, progress)
    findings += (Finding(contest.kind, contest.key, contest.message) for contest in contests(chain.store))
    return VerifyReport(
        chain.url, commit_mode(chain.store), len(manifests), len(shortcuts), len(objects), is_deep, tuple(findings)
    )


def _parsed_manifests(chain: Chain, findings: list[Finding]) -> Iterator[Manifest]:
    for info in chain.store.list(keys.COMMITS):
        version = keys.version_of_commit(info.key)
        if version is None:
            findings.append(Finding("commit-key", info.key, "is not the key of a version"))
            continue
        try:
            yield chain.manifest(version)
        except SignatureError as error:
            findings.append(Finding("signature", info.key, str(error)))
        except (CorruptError, UnsupportedFeatureError) as error:
            findings.append(Finding("manifest", info.key, str(error)))


def _parsed_shortcuts(chain: Chain, manifests: list[Manifest], findings: list[Finding]) -> Iterator[Shortcut]:
    ways = Ways(chain)
    for manifest in manifests:
        try:
            for shortcut in ways.shortcuts_into(manifest.version):
                if shortcut.commit_id == manifest.commit_id:
                    yield shortcut
                else:
                    findings.append(
                        Finding("shortcut-commit", shortcut.key, "leads to a commit that the chain has not")
                    )
        except (CorruptError, UnsupportedFeatureError) as error:
            findings.append(Finding("shortcut", f"into version {manifest.version}", str(error)))
    findings += (Finding("signature", key, str(error)) for key, error in ways.refused.items())


def _history_findings(chain: Chain, manifests: list[Manifest]) -> Iterator[Finding]:
    by_version = {m.version: m for m in manifests}
    horizon = oldest_kept(chain)
    if manifests:
        expected = range(horizon, manifests[-1].version + 1)
        for version in (v for v in expected if v not in by_version):
            yield Finding("contiguous", keys.commit(version), "is missing between kept versions")
    for commit_id, count in Counter(m.commit_id for m in manifests).items():
        if count > 1:
            yield Finding("commit-id", commit_id, f"stands in {count} manifests")
    bases = [m.base_model for m in manifests if m.base_model is not None]
    for manifest in manifests:
        if bases and manifest.base_model not in (None, bases[0]):
            yield Finding("base-model", manifest.key, "is an adapter of another base model than the chain's")
    for manifest in manifests:
        earlier = None if manifest.reverts_to is None else by_version.get(manifest.reverts_to)
        if earlier is not None and earlier.digests != manifest.digests:
            yield Finding("revert", manifest.key, f"is not the state of version {earlier.version}")
        if len({payload.key for payload in manifest.payloads}) != len(manifest.payloads):
            yield Finding("payload-keys", manifest.key, "names a payload twice")


def _object_findings(chain: Chain, objects: dict[str, StoredObject]) -> Iterator[Finding]:
    for key, ref in objects.items():
        info = chain.store.head(key)
        if info is None:
            yield Finding("object-missing", key, "a kept version needs it")
        elif info.nbytes != ref.nbytes:
            yield Finding("object-size", key, f"has {info.nbytes} bytes, its manifest says {ref.nbytes}")


def _pointer_findings(chain: Chain, manifests: list[Manifest]) -> Iterator[Finding]:
    by_version = {m.version: m for m in manifests}
    for ref in current_refs(chain).values():
        found = by_version.get(ref.version)
        if found is None or found.commit_id != ref.commit_id:
            yield Finding("ref", ref.name, f"stands for version {ref.version}, commit {ref.commit_id}: not there")
    for kind in (EVALUATIONS, REFRESHES):
        for record in read_records(chain, kind):
            if manifests and record["version"] > manifests[-1].version:
                yield Finding("record", f"{kind}/{record['version']}", "speaks of a version that does not exist")


def _replay_findings(
    chain: Chain,
    manifests: list[Manifest],
    shortcuts: list[Shortcut],
    group_nbytes: int,
    progress: Progress | None,
) -> Iterator[Finding]:
    """Every way into every version gives the state that its manifest says."""
    horizon = oldest_kept(chain)
    kept = [m for m in manifests if m.version >= horizon]
    into: dict[int, list[Hop]] = {m.version: [] for m in kept}
    for shortcut in shortcuts:
        if shortcut.version in into and (shortcut.base_version is None or shortcut.base_version >= horizon):
            into[shortcut.version].append(hop_of_shortcut(shortcut))
    groups = list(tensor_groups(kept[-1].specs.values(), group_nbytes)) if kept else []
    failed: set[tuple[int | None, int]] = set()
    with fetching(chain.store) as fetcher:
        for number, names in enumerate(groups):
            state = HostState()
            for manifest in kept:
                for hop, error in _replay_into(chain, state, manifest, into[manifest.version], names, fetcher):
                    if (hop.base_version, hop.version) not in failed:
                        failed.add((hop.base_version, hop.version))
                        yield Finding("replay", f"version {hop.version} from {_where(hop.base_version)}", str(error))
                if state.version != manifest.version:
                    return
                if progress is not None:
                    progress(number * len(kept) + manifest.version - horizon + 1, len(groups) * len(kept))


def _where(version: int | None) -> str:
    return "nothing" if version is None else f"version {version}"


def _replay_into(
    chain: Chain,
    state: HostState,
    manifest: Manifest,
    shortcuts: list[Hop],
    names: frozenset[str],
    fetcher: Fetcher,
) -> Iterator[tuple[Hop, WeightlineError]]:
    """Try the shortcuts on states of their own, then move `state` to the version by its own payloads."""
    for hop in shortcuts:
        other = HostState()
        try:
            if hop.base_version is not None:
                advance_state(chain, other, hop.base_version, names.__contains__, fetcher)
            apply_hop(chain, other, hop, fetcher, names.__contains__)
        except (CorruptError, NotFoundError, StorageError) as error:
            yield hop, error
    own = hop_of(manifest)
    try:
        if state.version is None and own.base_version is not None:
            advance_state(chain, state, manifest.version, names.__contains__, fetcher)
        else:
            apply_hop(chain, state, own, fetcher, names.__contains__)
    except (CorruptError, NotFoundError, StorageError) as error:
        yield own, error
        state.version = None
