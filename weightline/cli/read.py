"""weightline log | show | diff | plan | pull: inspect a chain, and write a version as a checkpoint folder."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from weightline.cli.output import Bucket, Json, emit, percent, table, transferring
from weightline.lineage.text import format_nbytes

if TYPE_CHECKING:
    from weightline.format.manifest import Manifest


def log(
    bucket: Bucket,
    limit: Annotated[int, typer.Option(min=1, help="Newest versions to show.")] = 1_000_000,
    as_json: Json = False,
) -> None:
    """List the versions of a chain, newest first."""
    from weightline.chain import open_chain

    chain = open_chain(bucket)
    versions = chain.versions()[-limit:]
    manifests = [chain.manifest(version) for version in reversed(versions)]
    rows = [
        (m.version, m.kind, m.stage, m.global_step, percent(m.num_changed, m.num_elements),
         format_nbytes(m.payload_nbytes), percent(m.payload_nbytes, m.full_nbytes), m.created_at)
        for m in manifests
    ]  # fmt: skip
    header = ("version", "kind", "stage", "step", "changed", "bytes", "of full", "committed")
    emit({"versions": [summary(m) for m in manifests]}, table(header, rows), as_json=as_json)


def summary(manifest: Manifest) -> dict[str, Any]:
    """Returns the manifest without its tensors and payloads."""
    return manifest.model_dump(exclude={"tensors", "payloads", "assets", "features", "format"})


def show(
    bucket: Bucket,
    version: Annotated[str, typer.Argument(help="A number, 'tip', or the name of a ref.")] = "tip",
    as_json: Json = False,
) -> None:
    """Show one version: manifest, payloads, tensors, refs, evaluations and refreshes."""
    from weightline.chain import open_chain
    from weightline.chain.read.records import EVALUATIONS, LOGGED, REFRESHES, read_version_records
    from weightline.chain.read.refs import current_refs, resolve

    chain = open_chain(bucket)
    manifest = chain.manifest(resolve(chain, version))
    records = {
        kind: read_version_records(chain, kind, manifest.version) for kind in (EVALUATIONS, REFRESHES, LOGGED)
    }
    refs = [ref.name for ref in current_refs(chain).values() if ref.commit_id == manifest.commit_id]
    document = manifest.model_dump() | {"refs": refs, **records}
    lines = [f"{name:<15} {value}" for name, value in summary(manifest).items() if value not in (None, {}, False)]
    lines += [
        f"{'changed':<15} {percent(manifest.num_changed, manifest.num_elements)}",
        f"{'refs':<15} {', '.join(refs)}",
    ]
    lines += [
        "",
        *table(("payload", "rank", "bytes"), [(p.key, p.rank, format_nbytes(p.nbytes)) for p in manifest.payloads]),
    ]
    tensors = [(n, t.dtype, "x".join(map(str, t.shape)) or "scalar", t.digest) for n, t in manifest.tensors.items()]
    lines += ["", *table(("tensor", "dtype", "shape", "digest"), tensors)]
    lines += [f"{kind}: {record}" for kind, found in records.items() for record in found]
    emit(document, lines, as_json=as_json)


def diff(
    bucket: Bucket,
    a: Annotated[str, typer.Argument(help="A version, 'tip', or a ref.")],
    b: Annotated[str, typer.Argument(help="A version, 'tip', or a ref.")] = "tip",
    as_json: Json = False,
) -> None:
    """Count the elements of every tensor whose bits differ between two versions."""
    from weightline.chain import open_chain
    from weightline.chain.read.refs import resolve
    from weightline.chain.replay.diff import diff_versions

    chain = open_chain(bucket)
    first, second = resolve(chain, a), resolve(chain, b)
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
    start: Annotated[str, typer.Option("--from", help="The reader's version; 'nothing' for a new reader.")] = "nothing",
    to: Annotated[str, typer.Option("--to", help="The wanted version.")] = "tip",
    as_json: Json = False,
) -> None:
    """Print the cheapest path from one version to another, forward or backward. Fetches no payload."""
    from weightline.chain import open_chain
    from weightline.chain.read.refs import resolve
    from weightline.chain.replay.plan import plan_between

    chain = open_chain(bucket)
    have = None if start == "nothing" else resolve(chain, start)
    found = plan_between(chain, have, resolve(chain, to))
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
    version: Annotated[str, typer.Option(help="A number, 'tip', or the name of a ref.")] = "tip",
    as_json: Json = False,
) -> None:
    """Write a version as a checkpoint folder that transformers loads; every tensor's digest is checked."""
    from weightline.chain import open_chain
    from weightline.chain.files.checkpoint import write_checkpoint
    from weightline.chain.read.refs import resolve
    from weightline.chain.replay.plan import plan_between

    chain = open_chain(bucket)
    number = resolve(chain, version)
    with transferring("pulling", lambda: plan_between(chain, None, number).payload_nbytes):
        write_checkpoint(chain, number, out)
    manifest = chain.manifest(number)
    document = {
        "version": number,
        "commit_id": manifest.commit_id,
        "out": str(out),
        "num_tensors": len(manifest.tensors),
    }
    emit(document, [f"version {number} ({len(manifest.tensors)} tensors, digests checked) -> {out}"], as_json=as_json)
