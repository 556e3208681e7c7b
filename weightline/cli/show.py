"""weightline show BUCKET VERSION: one manifest, its payloads and what happened to it."""

from __future__ import annotations

from typing import Annotated

import typer

from weightline.chain import open_chain
from weightline.chain.read.records import EVALUATIONS, REFRESHES, read_records
from weightline.chain.read.refs import current_refs, resolve
from weightline.cli.log import summary
from weightline.cli.output import Bucket, Json, emit, percent, size, table


def run(
    bucket: Bucket,
    version: Annotated[str, typer.Argument(help="A number, 'tip', or the name of a ref.")] = "tip",
    as_json: Json = False,
) -> None:
    """Show one version: manifest, payloads, tensors, refs, evaluations and refreshes."""
    chain = open_chain(bucket)
    manifest = chain.manifest(resolve(chain, version))
    records = {
        kind: [r for r in read_records(chain, kind) if r["version"] == manifest.version]
        for kind in (EVALUATIONS, REFRESHES)
    }
    refs = [ref.name for ref in current_refs(chain).values() if ref.commit_id == manifest.commit_id]
    document = manifest.model_dump() | {"refs": refs, **records}
    lines = [f"{name:<15} {value}" for name, value in summary(manifest).items() if value not in (None, {}, False)]
    lines += [
        f"{'changed':<15} {percent(manifest.num_changed, manifest.num_elements)}",
        f"{'refs':<15} {', '.join(refs)}",
    ]
    lines += ["", *table(("payload", "rank", "bytes"), [(p.key, p.rank, size(p.nbytes)) for p in manifest.payloads])]
    tensors = [(n, t.dtype, "x".join(map(str, t.shape)) or "scalar", t.digest) for n, t in manifest.tensors.items()]
    lines += ["", *table(("tensor", "dtype", "shape", "digest"), tensors)]
    lines += [f"{kind}: {record}" for kind, found in records.items() for record in found]
    emit(document, lines, as_json=as_json)
