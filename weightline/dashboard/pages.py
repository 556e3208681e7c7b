"""The documents of a chain for the browser: a card, an overview of the whole chain, and a window of versions. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from weightline.dashboard.series import metric_names
from weightline.dashboard.snapshot import Snapshot
from weightline.lineage.edges import anchored_versions, lineage_edges
from weightline.lineage.rows import LineageRow

_SPARK_POINTS = 60


def card(identifier: str, name: str, url: str, snapshot: Snapshot) -> dict[str, Any]:
    """Returns the summary of a chain for the list of chains: its tip, state and best score."""
    newest = snapshot.rows[-1] if snapshot.rows else None
    first = snapshot.row(0)
    origin = first.forked_from if first else None
    return {
        "id": identifier,
        "name": name,
        "url": url,
        "generation": snapshot.generation,
        "state": snapshot.state,
        "problem": snapshot.problem,
        "tip": snapshot.tip,
        "first": snapshot.versions[0] if snapshot.versions else None,
        "num_versions": len(snapshot.versions),
        "num_pending": snapshot.num_pending,
        "broken": [{"version": version, "reason": why} for version, why in sorted(snapshot.broken.items())[:50]],
        "num_broken": len(snapshot.broken),
        "missing": list(snapshot.missing[:50]),
        "stages": list(snapshot.stages),
        "metrics": metric_names(snapshot.rows),
        "committed_at": newest.created_at if newest else None,
        "stage": newest.stage if newest else None,
        "num_elements": newest.num_elements if newest else None,
        "full_nbytes": newest.full_nbytes if newest else None,
        "chain_nbytes": sum(row.payload_nbytes for row in snapshot.rows),
        "scores": _spark(snapshot.rows),
        "best": _best(snapshot.rows),
        "replicas": list(snapshot.replicas),
        "forked_from": origin.model_dump() if origin else None,
    }


def unshown_card(identifier: str, name: str, url: str, problem: str) -> dict[str, Any]:
    """Returns the summary of a chain that cannot be drawn: an empty one, with the reason."""
    return card(identifier, name, url, Snapshot(state="unreachable", problem=problem))


def glance(snapshot: Snapshot, max_bins: int) -> dict[str, Any]:
    """Returns the whole chain in at most `max_bins` bins of consecutive versions, with a summary of each."""
    if not snapshot.versions:
        return {"first": None, "last": None, "bin_size": 1, "bins": []}
    first, last = snapshot.versions[0], snapshot.versions[-1]
    size = max(1, -(-(last - first + 1) // max_bins))
    held: defaultdict[int, list[LineageRow]] = defaultdict(list)
    for row in snapshot.rows:
        held[(row.version - first) // size].append(row)
    broken = {(version - first) // size for version in snapshot.broken}
    bins = [_bin(first + at * size, held[at], at in broken) for at in range((last - first) // size + 1)]
    return {"first": first, "last": last, "bin_size": size, "bins": bins}


def window(snapshot: Snapshot, first: int, last: int, forks: Mapping[int, Sequence[str]]) -> dict[str, Any]:
    """Returns versions first..last as a graph: nodes with refs, forks and replicas, and the edges that end at them.

    `forks`: ids of the chains that start from a version of this one, by version.
    """
    rows = snapshot.window(first, last)
    anchored = anchored_versions(snapshot.shortcuts)
    names: defaultdict[int, list[str]] = defaultdict(list)
    for name, version in snapshot.refs.items():
        names[version].append(name)
    return {
        "first": first,
        "last": last,
        "nodes": [
            {
                **node(row),
                "has_anchor": row.version in anchored,
                "refs": sorted(names[row.version]),
                "forks": list(forks.get(row.version, ())),
                "replicas": [r["name"] for r in snapshot.replicas if r["version"] == row.version and _is_live(r)],
            }
            for row in rows
        ],
        "edges": [[edge.kind, edge.source, edge.target] for edge in lineage_edges(rows, snapshot.shortcuts)],
        "broken": {version: why for version, why in snapshot.broken.items() if first <= version <= last},
        "missing": [gap for gap in snapshot.missing if gap[0] <= last and gap[1] >= first],
    }


def node(row: LineageRow) -> dict[str, Any]:
    """Returns the fields of a version that lists of versions show."""
    return {
        "version": row.version,
        "stage": row.stage,
        "kind": row.kind,
        "global_step": row.global_step,
        "is_milestone": row.is_milestone,
        "base_version": row.base_version,
        "reverts_to": row.reverts_to,
        "created_at": row.created_at,
        "changed_fraction": row.changed_fraction,
        "payload_nbytes": row.payload_nbytes,
        "ratio_to_full": row.ratio_to_full,
        "evaluation": row.evaluation,
        "score": row.score,
        "serving": row.serving,
        "served_at": row.served_at,
        "pause_seconds": row.pause_seconds,
        "lag_seconds": row.lag_seconds,
    }


def _is_live(replica: Mapping[str, Any]) -> bool:
    return not replica.get("is_expired", False)


def _bin(first: int, rows: Sequence[LineageRow], is_broken: bool) -> dict[str, Any]:
    scores = [row.score for row in rows if row.score is not None]
    changed = [row.changed_fraction for row in rows if row.kind != "anchor"]
    return {
        "first": first,
        "stage": rows[-1].stage if rows else None,
        "changed": _mean(changed),
        "score": _mean(scores),
        "has_anchor": any(row.kind == "anchor" for row in rows),
        "has_revert": any(row.kind == "revert" for row in rows),
        "has_milestone": any(row.is_milestone for row in rows),
        "is_broken": is_broken,
    }


def _mean(numbers: Sequence[float]) -> float | None:
    return sum(numbers) / len(numbers) if numbers else None


def _spark(rows: Sequence[LineageRow]) -> list[float]:
    scores = [row.score for row in rows if row.score is not None]
    size = max(1, -(-len(scores) // _SPARK_POINTS))
    return [sum(part) / len(part) for part in (scores[at : at + size] for at in range(0, len(scores), size))]


def _best(rows: Iterable[LineageRow]) -> dict[str, Any] | None:
    scored = [(row.score, -row.version) for row in rows if row.score is not None]
    if not scored:
        return None
    score, version = max(scored)
    return {"version": -version, "score": score}
