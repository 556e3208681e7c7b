"""weightline compact | expire | gc | verify | repair: maintain a chain, check it, and remove what is broken."""

from __future__ import annotations

from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Annotated

import typer

from weightline.cli.output import DEFAULT_CODING, Bucket, Coding, Json, emit, table
from weightline.errors import ChainEmptyError
from weightline.lineage.text import format_nbytes


def compact(
    bucket: Bucket,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Plan only.")] = False,
    coding: Coding = DEFAULT_CODING,
    as_json: Json = False,
) -> None:
    """Write shortcuts to the tip, and an anchor, when they save readers enough bytes or time."""
    from weightline.chain import open_chain
    from weightline.chain.upkeep.compact import plan_compaction, write_compaction

    chain = open_chain(bucket)
    plan = plan_compaction(chain, coding=coding)
    written = [] if dry_run else write_compaction(chain, plan, coding=coding)
    document = {
        "tip": plan.tip, "bases": plan.bases, "writes_anchor": plan.writes_anchor, "dry_run": dry_run,
        "shortcuts": [s.model_dump(exclude={"payloads"}) for s in written],
    }  # fmt: skip
    rows = [
        ("nothing" if s.base_version is None else s.base_version, s.version, format_nbytes(s.payload_nbytes))
        for s in written
    ]
    anchor = " and an anchor" if plan.writes_anchor else ""
    summary = f"{len(plan.bases)} shortcuts{anchor} to version {plan.tip} {'would be ' if dry_run else ''}written"
    emit(document, [*table(("from", "to", "bytes"), rows), summary], as_json=as_json)


def expire(
    bucket: Bucket,
    before: Annotated[str, typer.Option(help="Keep this version and later ones: a number or a ref.")],
    as_json: Json = False,
) -> None:
    """Move the horizon: gc may delete the versions before it, except those that refs or live replicas name."""
    from weightline.chain import open_chain
    from weightline.chain.read.refs import oldest_kept, resolve
    from weightline.chain.upkeep.retention import expire_before

    chain = open_chain(bucket)
    earlier = oldest_kept(chain)
    horizon = expire_before(chain, resolve(chain, before))
    line = f"oldest kept version: {horizon} (was {earlier}); weightline gc frees the space"
    emit({"oldest_kept": horizon, "was": earlier}, [line], as_json=as_json)


def gc(
    bucket: Bucket,
    delete: Annotated[bool, typer.Option("--delete", help="Delete. Without it, only list the objects.")] = False,
    grace_hours: Annotated[float, typer.Option(min=0.0, help="Keep objects younger than this.")] = 24.0,
    as_json: Json = False,
) -> None:
    """Delete objects that no kept version, ref or live replica can reach."""
    from weightline.chain import open_chain
    from weightline.chain.upkeep.gc import collect, plan_gc, view_chain

    chain = open_chain(bucket)
    plan = plan_gc(view_chain(chain), grace=timedelta(hours=grace_hours))
    if delete:
        collect(chain, plan)
    document = {
        "deleted": delete, "num_objects": len(plan.objects), "nbytes": plan.nbytes,
        "keys": [info.key for info in plan.objects],
    }  # fmt: skip
    verb = "deleted" if delete else "would be deleted (add --delete)"
    lines = [f"{info.key}  {format_nbytes(info.nbytes)}" for info in plan.objects]
    emit(document, [*lines, f"{len(plan.objects)} objects, {format_nbytes(plan.nbytes)} {verb}"], as_json=as_json)


def verify(
    bucket: Bucket,
    quick: Annotated[
        bool, typer.Option("--quick", help="Check manifests and object sizes only; replay nothing.")
    ] = False,
    require_signature: Annotated[
        Path | None, typer.Option(metavar="KEYFILE", help="Every manifest and shortcut must be signed by one of these.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Check manifests, objects and digests, and replay every version. Checks signatures when a key is given."""
    from weightline.chain import open_chain
    from weightline.chain.upkeep.verify import verify_chain
    from weightline.format.signature import load_trusted_keys

    chain = open_chain(bucket, None if require_signature is None else load_trusted_keys(require_signature))
    report = verify_chain(chain, is_deep=not quick)
    if report.num_versions == 0 and report.holds:
        raise ChainEmptyError(f"{chain.url} holds no version: check the URL", chain=chain.url)
    verdict = "all holds" if report.holds else f"{len(report.findings)} findings"
    counts = f"{report.num_versions} versions, {report.num_shortcuts} shortcuts, {report.num_objects} objects"
    extent = f"{counts}, commit mode {report.commit_mode}"
    lines = [f"{f.rule}: {f.subject}: {f.message}" for f in report.findings]
    emit(asdict(report) | {"holds": report.holds}, [*lines, f"{extent}: {verdict}"], as_json=as_json)
    if not report.holds:
        raise typer.Exit(1)


def repair(
    bucket: Bucket,
    delete: Annotated[bool, typer.Option("--delete", help="Remove; without it, only say what would go.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Look at manifests and object sizes; replay nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Remove shortcuts that are broken and names of versions that are gone. Exit code 1 when other faults remain."""
    from weightline.chain import open_chain
    from weightline.chain.upkeep.repair import plan_repair, write_repair
    from weightline.chain.upkeep.verify import verify_chain

    chain = open_chain(bucket)
    plan = plan_repair(verify_chain(chain, is_deep=not quick).findings)
    if delete:
        write_repair(chain, plan)
    verb = "removed" if delete else "would be removed (add --delete)"
    lines = [f"{finding.key}: {finding.message}" for finding in plan.removed]
    lines += [f"{len(plan.removed)} objects {verb}"]
    lines += [f"left: {f.rule}: {f.subject}: {f.message}" for f in plan.left]
    document = {
        "deleted": delete, "removed": [asdict(f) for f in plan.removed], "left": [asdict(f) for f in plan.left],
    }  # fmt: skip
    emit(document, lines, as_json=as_json)
    if plan.left:
        raise typer.Exit(1)
