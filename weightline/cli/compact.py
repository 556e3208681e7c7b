"""weightline compact BUCKET: shortcuts and anchors where they pay."""

from __future__ import annotations

from typing import Annotated

import typer

from weightline.chain import open_chain
from weightline.chain.upkeep.compact import plan_compaction, write_compaction
from weightline.chain.write.standalone import DEFAULT_CODING
from weightline.cli.output import Bucket, Json, emit, size, table


def run(
    bucket: Bucket,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Plan only.")] = False,
    coding: Annotated[str, typer.Option(help="How shortcuts are coded.")] = DEFAULT_CODING,
    as_json: Json = False,
) -> None:
    """Write shortcuts to the tip, and an anchor, where readers would otherwise pay more."""
    chain = open_chain(bucket)
    plan = plan_compaction(chain, coding=coding)
    written = [] if dry_run else write_compaction(chain, plan, coding=coding)
    document = {
        "tip": plan.tip, "bases": plan.bases, "writes_anchor": plan.writes_anchor, "dry_run": dry_run,
        "shortcuts": [s.model_dump(exclude={"payloads"}) for s in written],
    }  # fmt: skip
    rows = [
        ("nothing" if s.base_version is None else s.base_version, s.version, size(s.payload_nbytes)) for s in written
    ]
    anchor = " and an anchor" if plan.writes_anchor else ""
    summary = f"{len(plan.bases)} shortcuts{anchor} to version {plan.tip} {'would be ' if dry_run else ''}written"
    emit(document, [*table(("from", "to", "bytes"), rows), summary], as_json=as_json)
