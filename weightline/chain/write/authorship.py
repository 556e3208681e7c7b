"""What a version says of where it comes from, and its manifest: the same for every writer. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from weightline.codec.anchor import ANCHOR_CODING
from weightline.codec.digest import format_digest
from weightline.format.manifest import AdapterBase, AssetRef, Manifest, Origin, PayloadRef, TensorState
from weightline.types import TensorSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Authorship:
    """What its writer knows of a version before anything of it is written."""

    stage: str
    run_id: str
    global_step: int
    kind: Literal["anchor", "delta", "revert"]
    coding: str
    """Of deltas; an anchor has its own."""
    reverts_to: int | None = None
    forked_from: Origin | None = None
    base_model: AdapterBase | None = None
    is_milestone: bool
    assets: tuple[AssetRef, ...] = ()
    metrics: dict[str, float] = field(default_factory=dict)
    provenance: dict[str, str] = field(default_factory=dict)


def build_manifest(
    author: Authorship,
    specs: Mapping[str, TensorSpec],
    digests: Mapping[str, int],
    payloads: tuple[PayloadRef, ...],
    *,
    version: int,
    commit_id: str,
    created_at: str,
    num_changed: int,
    world_size: int,
) -> Manifest:
    """The manifest of a version whose payloads are up. `digests` of its whole state, by tensor; an anchor changes all.

    ValidationError, by pydantic, for facts that contradict each other.
    """
    is_anchor = author.kind == "anchor"
    num_elements = sum(spec.num_elements for spec in specs.values())
    return Manifest(
        version=version,
        base_version=None if is_anchor else version - 1,
        kind=author.kind,
        reverts_to=author.reverts_to,
        forked_from=author.forked_from,
        base_model=author.base_model,
        commit_id=commit_id,
        created_at=created_at,
        run_id=author.run_id,
        stage=author.stage,
        global_step=author.global_step,
        is_milestone=author.is_milestone,
        coding=ANCHOR_CODING if is_anchor else author.coding,
        world_size=world_size,
        num_changed=num_elements if is_anchor else num_changed,
        num_elements=num_elements,
        payload_nbytes=sum(payload.nbytes for payload in payloads),
        full_nbytes=sum(spec.nbytes for spec in specs.values()),
        payloads=payloads,
        assets=author.assets,
        tensors={
            name: TensorState(dtype=spec.dtype, shape=spec.shape, digest=format_digest(digests[name]))
            for name, spec in specs.items()
        },
        metrics=author.metrics,
        provenance=author.provenance,
    )
