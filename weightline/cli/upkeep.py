"""weightline compact | expire | gc | verify | repair: maintain a chain, check it, and remove what is broken."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from weightline.cli.chains import open_existing
from weightline.cli.output import (
    DEFAULT_CODING,
    Bucket,
    Coding,
    Json,
    Version,
    emit,
    one_version,
    table,
    warn,
)
from weightline.lineage.text import format_nbytes

if TYPE_CHECKING:
    from weightline.chain import Chain
    from weightline.chain.upkeep.verify import VerifyReport
    from weightline.format.signature import TrustedKeys


def compact(
    bucket: Bucket,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Plan only.")] = False,
    coding: Coding = DEFAULT_CODING,
    as_json: Json = False,
) -> None:
    """Write shortcuts to the tip, and an anchor, when they save readers enough bytes or time."""
    from weightline.chain.upkeep.compact import plan_compaction, write_compaction

    chain = open_existing(bucket)
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
    version: Version = None,
    before: Annotated[
        str | None, typer.Option("--before", "--version", metavar="VERSION", help="Same as the argument.")
    ] = None,
    keep: Annotated[int | None, typer.Option(min=1, metavar="N", help="Keep the N newest versions.")] = None,
    keep_best: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Also keep the N best by --metric: refs best-METRIC-1..N.")
    ] = None,
    metric: Annotated[
        str | None, typer.Option(metavar="NAME", help="score, a metric of the evaluation, or one that training logged.")
    ] = None,
    lowest: Annotated[bool, typer.Option("--lowest", help="The lowest value is the best one, as for a loss.")] = False,
    as_json: Json = False,
) -> None:
    """Keep VERSION and later ones, or the newest (--keep). Then gc may delete those before, but none that has a name.

    With --keep-best alone, the tip and the best versions stay. gc also keeps what live replicas serve.
    """
    from weightline.chain.read.refs import oldest_kept, resolve
    from weightline.chain.upkeep.retention import expire_before, first_of_newest

    if (keep_best is None) != (metric is None):
        raise typer.BadParameter("--keep-best and --metric belong together", param_hint="--keep-best")
    if lowest and keep_best is None:
        raise typer.BadParameter("it says which versions --keep-best takes: give both", param_hint="--lowest")
    if keep is not None and (version is not None or before is not None):
        raise typer.BadParameter("give a version or --keep, not both", param_hint="--keep")
    named = one_version(version, before, None if keep is None and keep_best is None else "tip")
    chain = open_existing(bucket)
    horizon = resolve(chain, named) if keep is None else first_of_newest(chain, keep)
    # Names first: once the horizon has moved, gc may delete a version without one.
    best = [] if keep_best is None or metric is None else _name_best(chain, metric, keep_best, is_lowest=lowest)
    earlier = oldest_kept(chain)
    moved = expire_before(chain, horizon)
    lines = table(("ref", "version", metric or ""), [(name, n, f"{value:.6g}") for name, n, value in best])
    line = f"oldest kept version: {moved} (was {earlier}); weightline gc frees the space"
    document = {
        "oldest_kept": moved, "was": earlier,
        "best": [{"ref": name, "version": n, "value": value} for name, n, value in best],
    }  # fmt: skip
    emit(document, [*(lines if best else []), line], as_json=as_json)


def _name_best(chain: Chain, metric: str, num_best: int, *, is_lowest: bool) -> list[tuple[str, int, float]]:
    """Moves the refs best-METRIC-1..N to the N best versions. Returns (ref, version, value) of each."""
    from weightline.chain.read.refs import current_refs, move_ref, oldest_kept
    from weightline.lineage.listing import best_prefix, best_versions, list_versions

    refs, horizon = current_refs(chain), oldest_kept(chain)
    named = {ref.version for ref in refs.values()}
    # A version before the horizon that has no name may be deleted at any moment.
    versions = [version for version in chain.versions() if version >= horizon or version in named]
    listed, problems = list_versions(chain, versions)
    warn(problems)
    best = best_versions(listed, metric, num_best, is_lowest=is_lowest)
    prefix = best_prefix(metric)
    for rank, (version, _) in enumerate(best, start=1):
        move_ref(chain, f"{prefix}{rank}", version)
    for name in refs:
        rank_text = name.removeprefix(prefix)
        if name != rank_text and rank_text.isdecimal() and int(rank_text) > len(best):
            # A ref cannot be removed. At the best version, one of an earlier, larger N keeps nothing of its own.
            move_ref(chain, name, best[0][0])
    return [(f"{prefix}{rank}", version, value) for rank, (version, value) in enumerate(best, start=1)]


def gc(
    bucket: Bucket,
    delete: Annotated[bool, typer.Option("--delete", help="Delete. Without it, only list the objects.")] = False,
    grace_hours: Annotated[float, typer.Option(min=0.0, help="Keep objects younger than this.")] = 24.0,
    as_json: Json = False,
) -> None:
    """Delete objects that no kept version, ref or live replica can reach."""
    from weightline.chain.upkeep.gc import collect, find_garbage

    chain = open_existing(bucket)
    plan = find_garbage(chain, grace_hours, will_delete=delete)
    if delete:
        collect(chain, plan)
    document = {
        "deleted": delete, "num_objects": len(plan.objects), "nbytes": plan.nbytes,
        "keys": [info.key for info in plan.objects],
    }  # fmt: skip
    verb = "deleted" if delete else "would be deleted, by this host's clock (add --delete)"
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
    from weightline.format.signature import load_trusted_keys

    trusted = None if require_signature is None else load_trusted_keys(require_signature)
    _, report = _verified(bucket, trusted, is_deep=not quick)
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
    from weightline.chain.upkeep.repair import plan_repair, write_repair

    chain, report = _verified(bucket, is_deep=not quick)
    plan = plan_repair(report.findings)
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


def _verified(bucket: str, trusted: TrustedKeys | None = None, *, is_deep: bool) -> tuple[Chain, VerifyReport]:
    """Opens and checks a chain. ChainEmptyError when there is none; one that lost all its versions has findings."""
    from weightline.chain import open_chain
    from weightline.chain.read.discovery import empty_chain_error
    from weightline.chain.upkeep.verify import verify_chain

    chain = open_chain(bucket, trusted)
    report = verify_chain(chain, is_deep=is_deep)
    if report.num_versions == 0 and report.holds:
        raise empty_chain_error(bucket)
    return chain, report
