"""Commits reverts: new versions whose state equals that of an earlier one.

A revert costs what changed between the two states. Tensors with equal digests are not read. For the others there are
two ways:

- **By the deltas between**, if readers would reach the tip from the earlier version by versions' own deltas, all in a
  coding whose steps can be decoded without a base (`gap`), and the revert is written in such a coding. The steps are
  added up and negated; no state is read. Shortcuts are not used: a version stands on the deltas that define its
  history, and a wrong shortcut would otherwise become a part of it.
- **By the two states** otherwise. `gap-by-magnitude` finds positions by the exponents of the base, in every tile that
  has changes, so the earlier state is read from the nearest anchor, and moved on to the tip: one replay gives both.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from weightline.chain.files.assets import assets_of, carry_assets
from weightline.chain.files.source import Tile, tiles_in
from weightline.chain.read.history import Chain
from weightline.chain.replay.diff import spec_groups
from weightline.chain.replay.fetch import Fetcher
from weightline.chain.replay.plan import REVERSIBLE_CODINGS, Hop, ReplayPlan, Routes
from weightline.chain.replay.state import DecodingState, OverlaidState, read_state, replay
from weightline.chain.write.commit import check_signing_key
from weightline.chain.write.draft import Authorship
from weightline.chain.write.standalone import DEFAULT_CODING, require_reverted
from weightline.chain.write.version_writer import VersionWriter
from weightline.codec.anchor import ANCHOR_CODING
from weightline.codec.changes import add_moves, join_parts, negate_moves
from weightline.codec.coding import coding_named, num_cpus
from weightline.dtypes import bits_dtype
from weightline.errors import CorruptError, InputError, NotFoundError, TransientStorageError
from weightline.format.manifest import Manifest
from weightline.format.write_payload import PayloadInfo, write_delta
from weightline.types import BitsArray, Changes, Segment, TensorSpec

_logger = logging.getLogger(__name__)


def commit_revert(chain: Chain, version: int, *, coding: str | None = None) -> Manifest:
    """Commits a new version whose state equals that of `version`. History stays linear.

    `coding` defaults to that of the tip. InputError when `version` is the tip; UnsupportedFeatureError for an unknown
    coding. A repeated call commits another version without changes. A crash leaves orphaned payloads, which gc removes.
    """
    tip, wanted = chain.tip_header(), chain.header(version)
    if wanted.version == tip.version:
        raise InputError(f"version {version} is the tip of {chain.url}: there is nothing to revert", version=version)
    coding = coding or (DEFAULT_CODING if tip.coding == ANCHOR_CODING else tip.coding)
    coding_named(coding)
    check_signing_key()
    author = Authorship(
        stage=wanted.stage, run_id=wanted.run_id, global_step=wanted.global_step, kind="revert", coding=coding,
        reverts_to=version, base_model=tip.base_model, is_milestone=True,
        assets=carry_assets(chain, version, chain, held=assets_of(chain, tip.version)),
    )  # fmt: skip
    before, digests = chain.digests(tip.version), chain.digests(version)
    specs = chain.layout(tip.version).by_name
    if digests.layout != before.layout:
        raise InputError(f"versions {version} and {tip.version} of {chain.url} hold different tensors", version=version)
    routes = Routes(chain)
    plan = routes.plan(version, tip.version)
    if coding in REVERSIBLE_CODINGS and _is_reversible(chain, plan):
        try:
            with VersionWriter(chain, tip.version + 1) as writer:
                _put_negated(writer, plan, list(specs.values()), frozenset(before.differing(digests)), coding)
            return writer.commit(author, specs, digests)
        except TransientStorageError:
            raise
        except (CorruptError, NotFoundError) as error:
            _logger.warning("%s: version %d is reverted to by its state: %s", chain.url, version, error)
    with VersionWriter(chain, tip.version + 1) as writer:
        pairs = _StatePairs(chain, tip.version, version, writer.fetcher, routes)
        reached = writer.put_deltas(
            list(specs.values()), before, lambda some: {spec.name: digests[spec.name] for spec in some}, pairs, coding
        )
    require_reverted(chain, author, reached)
    return writer.commit(author, specs, digests)


def _is_reversible(chain: Chain, plan: ReplayPlan) -> bool:
    """Returns whether every hop is a version's own delta, in a coding whose steps can be decoded without a base."""
    return all(
        hop.base_version is not None
        and not hop.is_shortcut
        and not hop.is_backward
        and chain.header(hop.version).coding in REVERSIBLE_CODINGS
        for hop in plan.hops
    )


def _put_negated(
    writer: VersionWriter, plan: ReplayPlan, specs: Sequence[TensorSpec], differing: frozenset[str], coding: str
) -> None:
    """Writes the deltas that undo the plan's, for the tensors whose digests differ."""
    for group in spec_groups(specs):
        names = [spec.name for spec in group if spec.name in differing]
        if names:
            writer.put(partial(_write_negated, fetcher=writer.fetcher, plan=plan, names=names, coding=coding))


def _write_negated(path: Path, fetcher: Fetcher, plan: ReplayPlan, names: Sequence[str], coding: str) -> PayloadInfo:
    wanted = frozenset(names)
    moves: dict[str, Changes] = {}
    for hop in plan.hops:
        for name, joined in _moves_of(fetcher, hop, wanted):
            moves[name] = add_moves(moves[name], joined) if name in moves else joined
    negated = (negate_moves(moves[name]) for name in names if name in moves)
    return write_delta(path, (moved for moved in negated if moved.num_changed), coding, num_threads=num_cpus())


def _moves_of(fetcher: Fetcher, hop: Hop, names: frozenset[str]) -> Iterator[tuple[str, Changes]]:
    """Yields, for each of these tensors that the hop's payloads cover, its name and its changes from zeros."""
    parts: dict[str, list[Changes]] = defaultdict(list)
    for ref in hop.payloads:
        changes = fetcher.open(ref).read_changes(
            lambda segment: segment.tensor.name in names, _zeros, num_threads=num_cpus()
        )
        for part in changes:
            parts[part.segment.tensor.name].append(part)
    for name, found in parts.items():
        yield name, join_parts(found)


def _zeros(segment: Segment) -> BitsArray:
    """Zeros that are only read take no memory."""
    return np.zeros(segment.length, bits_dtype(segment.tensor.dtype))


@dataclass(slots=True)
class _StatePairs:
    """Reads the wanted state, and the tip's as changes on top of it: one replay leads to both."""

    chain: Chain
    tip: int
    wanted: int
    fetcher: Fetcher
    routes: Routes

    def __call__(self, group: Sequence[TensorSpec]) -> Iterator[tuple[Tile, Tile]]:
        selects = frozenset(spec.name for spec in group).__contains__
        wanted = read_state(self.chain, self.wanted, selects, self.fetcher, self.routes)

        def begin() -> OverlaidState:
            return OverlaidState(self.wanted, wanted.specs, dict(wanted.digests), wanted.segment_bits)

        tip, _ = replay(self.chain, begin, self.tip, self.fetcher, selects, self.routes)
        if tip.version == self.tip:
            at_tip: DecodingState = tip
        else:  # the tip is cheaper to reach from an anchor
            at_tip = read_state(self.chain, self.tip, selects, self.fetcher, self.routes)
        for spec in group:
            for tile, new_N in tiles_in(spec, wanted.bits[spec.name]):
                yield (tile, at_tip.segment_bits(tile)), (tile, new_N)
