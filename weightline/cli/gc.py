"""weightline gc BUCKET: collect what nothing can reach. A dry run unless told otherwise."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Annotated

import typer

from weightline.chain import open_chain
from weightline.chain.upkeep.gc import collect, plan_gc, view_chain
from weightline.cli.output import Bucket, Json, emit, size


def run(
    bucket: Bucket,
    delete: Annotated[bool, typer.Option("--delete", help="Delete; without it, only say what would go.")] = False,
    grace_hours: Annotated[float, typer.Option(min=0.0, help="Leave objects younger than this alone.")] = 24.0,
    as_json: Json = False,
) -> None:
    """Delete objects that no kept version, ref or live replica can reach."""
    chain = open_chain(bucket)
    now = datetime.now(UTC)
    plan = plan_gc(view_chain(chain, now), now=now, grace=timedelta(hours=grace_hours))
    if delete:
        collect(chain, plan)
    document = {
        "deleted": delete, "num_objects": len(plan.objects), "nbytes": plan.nbytes,
        "keys": [info.key for info in plan.objects],
    }  # fmt: skip
    verb = "deleted" if delete else "would be deleted (add --delete)"
    lines = [f"{info.key}  {size(info.nbytes)}" for info in plan.objects]
    emit(document, [*lines, f"{len(plan.objects)} objects, {size(plan.nbytes)} {verb}"], as_json=as_json)
