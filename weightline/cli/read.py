"""weightline log | show | diff | plan | pull: inspect a chain, and write a version as a checkpoint folder."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from weightline.cli.chains import open_existing
from weightline.cli.output import (
    Bucket,
    Json,
    Version,
    VersionOption,
    emit,
    one_version,
    percent,
    screenful,
    table,
    transferring,
    warn,
)
from weightline.lineage.text import format_nbytes

if TYPE_CHECKING:
    from weightline.chain import Chain
    from weightline.format.manifest import Header
    from weightline.lineage.rows import Record


def log(
    bucket: Bucket,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Newest versions to show. [default: a screenful; with --json, all]")
    ] = None,
    as_json: Json = False,
) -> None:
    """List the versions of a chain, newest first, with their scores and refs."""
    from weightline.chain import open_chain
    from weightline.chain.read.discovery import empty_chain_error
    from weightline.cli.pages import log_lines
    from weightline.lineage.listing import list_versions
    from weightline.lineage.samples import staleness_by_version

    chain = open_chain(bucket)
    num_shown = limit or (None if as_json else screenful())
    versions = chain.versions()[::-1] if num_shown is None else chain.newest_versions(num_shown)
    if not versions:
        raise empty_chain_error(bucket)
    num_versions = len(versions) if num_shown is None else chain.num_versions(versions[0])
    listed, problems = list_versions(chain, versions)
    staleness, unreadable = staleness_by_version(chain, [one.row for one in listed])
    warn([*problems, *unreadable])
    document = {
        "num_versions": num_versions,
        "versions": [
            summary(chain, one.manifest)
            | {"score": one.row.score, "evaluation": one.row.evaluation, "refs": one.refs}
            | {"staleness": staleness.get(one.row.version)}
            for one in listed
        ],
    }
    lines = log_lines(listed, staleness)
    if len(listed) < num_versions:
        lines.append(f"{len(listed)} of {num_versions} versions; --limit {num_versions} shows all")
    emit(document, lines, as_json=as_json)


def summary(chain: Chain, header: Header) -> dict[str, Any]:
    """Returns the facts of a version without its tensors and payloads."""
    from weightline.format.manifest import Header

    facts = header.model_dump(include=set(Header.model_fields) - {"payloads", "features", "format"})
    return facts | {"provenance": chain.provenance(header)}


def show(
    bucket: Bucket,
    version: Version = None,
    version_option: VersionOption = None,
    as_json: Json = False,
) -> None:
    """Show one version: manifest, refs, evaluations, refreshes, samples, payloads and tensors. Default: the tip."""
    from weightline.chain.read.records import EVALUATIONS, LOGGED, REFRESHES, SAMPLES
    from weightline.chain.read.refs import resolve
    from weightline.cli.pages import version_lines
    from weightline.cli.samples import samples_lines
    from weightline.lineage.listing import read_good_records, refs_by_version

    chain = open_existing(bucket)
    manifest = chain.manifest(resolve(chain, one_version(version, version_option, "tip")))
    number = manifest.version
    records: dict[str, list[Record]] = {}
    for kind in (EVALUATIONS, REFRESHES, LOGGED, SAMPLES):
        found = read_good_records(chain, kind, number, number)
        warn(found.problems)
        records[kind] = list(found.of.get(number, ()))
    refs = refs_by_version(chain).get(number, ())
    emit(
        manifest.model_dump() | {"refs": refs, **records},
        [
            *version_lines(manifest, refs, records[EVALUATIONS], records[REFRESHES], records[LOGGED]),
            *samples_lines(records[SAMPLES]),
        ],
        as_json=as_json,
    )


def diff(
    bucket: Bucket,
    a: Annotated[str | None, typer.Argument(help="A version, 'tip', or a ref.")] = None,
    b: Annotated[str | None, typer.Argument(help="The other one. [default: tip]")] = None,
    version: Annotated[
        list[str] | None, typer.Option("--version", metavar="VERSION", help="Same as an argument; may be given twice.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Count the elements of every tensor whose bits differ between two versions."""
    from weightline.chain.read.refs import resolve
    from weightline.chain.replay.diff import diff_versions

    named = [one for one in (a, b, *(version or ())) if one is not None]
    if not 1 <= len(named) <= 2:
        raise typer.BadParameter("name one or two versions: as arguments or with --version", param_hint="A")
    chain = open_existing(bucket)
    first, second = (resolve(chain, one) for one in (*named, "tip")[:2])
    diffs = diff_versions(chain, first, second)
    num_changed, num_elements = sum(d.num_changed for d in diffs), sum(d.num_elements for d in diffs)
    document = {
        "a": first, "b": second, "num_changed": num_changed, "num_elements": num_elements,
        "tensors": [asdict(d) for d in diffs],
    }  # fmt: skip
    rows = [(d.name, d.num_changed, percent(d.num_changed, d.num_elements)) for d in diffs if d.num_changed]
    total = f"{first} -> {second}: {num_changed} of {num_elements} elements ({percent(num_changed, num_elements)})"
    emit(document, [*table(("tensor", "changed", "share"), rows), total], as_json=as_json)


def plan(
    bucket: Bucket,
    version: Version = None,
    start: Annotated[str, typer.Option("--from", help="The reader's version; 'nothing' for a new reader.")] = "nothing",
    to: Annotated[
        str | None, typer.Option("--to", "--version", metavar="VERSION", help="Same as the argument. [default: tip]")
    ] = None,
    as_json: Json = False,
) -> None:
    """Print the cheapest path from one version to another, forward or backward. Fetches no payload."""
    from weightline.chain.read.refs import resolve
    from weightline.chain.replay.plan import plan_between

    chain = open_existing(bucket)
    have = None if start == "nothing" else resolve(chain, start)
    found = plan_between(chain, have, resolve(chain, one_version(version, to, "tip")))
    hops = [
        {
            "from": hop.start, "to": hop.target, "is_backward": hop.is_backward, "is_shortcut": hop.is_shortcut,
            "num_objects": len(hop.payloads), "payload_nbytes": hop.payload_nbytes,
        }
        for hop in found.hops
    ]  # fmt: skip
    document = {
        "have": found.have, "want": found.want, "payload_nbytes": found.payload_nbytes,
        "num_objects": found.num_objects, "hops": hops,
    }  # fmt: skip
    rows = [
        (
            "nothing" if hop.start is None else hop.start,
            hop.target,
            len(hop.payloads),
            format_nbytes(hop.payload_nbytes),
            "backward" if hop.is_backward else "shortcut" if hop.is_shortcut else "",
        )
        for hop in found.hops
    ]
    total = f"{len(hops)} hops, {found.num_objects} objects, {format_nbytes(found.payload_nbytes)}"
    emit(document, [*table(("from", "to", "objects", "bytes", ""), rows), total], as_json=as_json)


def pull(
    bucket: Bucket,
    out: Annotated[Path, typer.Option(help="New folder for the checkpoint.")],
    version: Version = None,
    version_option: VersionOption = None,
    as_json: Json = False,
) -> None:
    """Write a version as a checkpoint folder that transformers loads; every tensor's digest is checked.

    Default: the tip.
    """
    from weightline.chain.files.checkpoint import write_checkpoint
    from weightline.chain.read.refs import resolve
    from weightline.chain.replay.plan import plan_between

    chain = open_existing(bucket)
    number = resolve(chain, one_version(version, version_option, "tip"))
    with transferring("pulling", lambda: plan_between(chain, None, number).payload_nbytes):
        write_checkpoint(chain, number, out)
    header, num_tensors = chain.header(number), len(chain.layout(number))
    document = {
        "version": number,
        "commit_id": header.commit_id,
        "out": str(out),
        "num_tensors": num_tensors,
    }
    emit(document, [f"version {number} ({num_tensors} tensors, digests checked) -> {out}"], as_json=as_json)
