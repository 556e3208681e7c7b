"""The documents of one version, and of two versions side by side, from manifests and a snapshot. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from weightline.dashboard.differing import COUNT_UNASKED_NBYTES, compare_digests
from weightline.dashboard.layers import layer_picture
from weightline.dashboard.pages import node
from weightline.dashboard.snapshot import Snapshot
from weightline.format.manifest import AdapterBase, Manifest
from weightline.lineage.rows import row_of, with_records
from weightline.rollouts.record import Group, SamplesRecord

_HTTP = re.compile(r"https?://[^\s\"'<>]+")
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_MAX_TENSORS = 2_000


def version_page(
    snapshot: Snapshot, manifest: Manifest, base: Manifest | None, prefect_ui: str | None
) -> dict[str, Any]:
    """Returns a version with its records, replicas and refs. `base`: the manifest of its base version, if it exists."""
    version = manifest.version
    evaluations, refreshes = snapshot.evaluations.get(version, ()), snapshot.refreshes.get(version, ())
    row = with_records(row_of(manifest), evaluations, refreshes, snapshot.logged.get(version, ()))
    return {
        **node(row),
        "run_id": manifest.run_id,
        "run_url": run_url(manifest, prefect_ui),
        "commit_id": manifest.commit_id,
        "state_digest": state_digest(manifest),
        "coding": manifest.coding,
        "world_size": manifest.world_size,
        "num_changed": manifest.num_changed,
        "num_elements": manifest.num_elements,
        "full_nbytes": manifest.full_nbytes,
        "forked_from": manifest.forked_from.model_dump() if manifest.forked_from else None,
        "base_model": manifest.base_model.model_dump() if manifest.base_model else None,
        "metrics": row.metrics,
        "provenance": manifest.provenance,
        "payloads": [payload.model_dump() for payload in manifest.payloads],
        "assets": [asset.name for asset in manifest.assets],
        "num_tensors": len(manifest.tensors),
        "tensors": [
            {"name": spec.name, "dtype": spec.dtype, "shape": spec.shape, "digest": manifest.digests[spec.name]}
            for spec in list(manifest.specs.values())[:_MAX_TENSORS]
        ],
        "evaluations": list(evaluations),
        "refreshes": list(refreshes),
        "replicas": [replica for replica in snapshot.replicas if replica["version"] == version],
        "refs": sorted(name for name, at in snapshot.refs.items() if at == version),
        "shortcuts_in": [base for base, target in snapshot.shortcuts if target == version],
        "layers": layer_picture(compare_digests(base, manifest)) if base else None,
        "counts_unasked": base is not None and counts_unasked(snapshot, manifest),
    }


def samples_page(found: SamplesRecord | None, problems: Sequence[str]) -> dict[str, Any]:
    """Returns the samples that a version was trained on, None without a record, and why a record cannot be read."""
    if found is None:
        return {"samples": None, "problems": list(problems)}
    samples = asdict(found) | {
        "num_samples": found.num_samples,
        "made_by": [{"version": version, "num_samples": number} for version, number in found.made_by.items()],
        "replicas": [
            {"name": name, **asdict(work), "samples_per_second": work.samples_per_second}
            for name, work in found.replicas.items()
        ],
        "groups": [_group(group) for group in found.groups],
    }
    return {"samples": samples, "problems": list(problems)}


def comparison_page(snapshot: Snapshot, a: Manifest, b: Manifest) -> dict[str, Any]:
    """Returns the scores and metrics of two versions side by side, and the tensors whose bits differ."""
    tensors = compare_digests(a, b)
    scores = [{e["name"]: e["score"] for e in snapshot.evaluations.get(m.version, ()) if "score" in e} for m in (a, b)]
    rows = [
        with_records(row_of(m), snapshot.evaluations.get(m.version, ()), (), snapshot.logged.get(m.version, ()))
        for m in (a, b)
    ]
    return {
        "a": node(rows[0]),
        "b": node(rows[1]),
        "scores": _pairs(*scores),
        "metrics": _pairs(rows[0].metrics, rows[1].metrics),
        "num_tensors": len(tensors),
        "num_different": sum(tensor.is_different for tensor in tensors),
        "is_same_state": a.digests == b.digests,
        "layers": layer_picture(tensors),
        "counts_unasked": a.specs == b.specs and counts_unasked(snapshot, b),
        "full_nbytes": b.full_nbytes,
    }


def counts_unasked(snapshot: Snapshot, manifest: Manifest) -> bool:
    """Returns whether a page counts elements without a request: the replay is cheap and no version is missing."""
    return manifest.full_nbytes <= COUNT_UNASKED_NBYTES and not snapshot.missing and not snapshot.broken


def state_digest(manifest: Manifest) -> str:
    """Returns one sha256 over the digests of all tensors, equal for equal states, as in records of evaluations."""
    return f"sha256:{AdapterBase.of('', manifest.digests, 0).digest}"


def run_url(manifest: Manifest, prefect_ui: str | None) -> str | None:
    """Returns a link to the run: from the provenance, or to the Prefect UI. Only http and https links are returned."""
    link = manifest.provenance.get("flow_run_url", "")
    if _HTTP.fullmatch(link):
        return link
    flow_run_id = manifest.provenance.get("flow_run_id", "")
    if prefect_ui is None or not _UUID.fullmatch(flow_run_id):
        return None
    return f"{prefect_ui.rstrip('/')}/runs/flow-run/{flow_run_id}"


def _group(group: Group) -> dict[str, Any]:
    completions = [
        {
            "text": one.text,
            "reward": one.reward,
            "spans": [(span.version, span.num_tokens) for span in one.spans],
        }
        for one in group.completions
    ]
    num_completions = group.num_completions or len(completions)
    return {"prompt": group.prompt, "num_completions": num_completions, "completions": completions}


def _pairs(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns both versions' numbers by name. Names that both have come first."""
    names = [name for name in b if name in a] + [name for name in b if name not in a] + [n for n in a if n not in b]
    return [{"name": name, "a": a.get(name), "b": b.get(name)} for name in names]
