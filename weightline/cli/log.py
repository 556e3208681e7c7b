"""weightline log BUCKET: the versions, newest first."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from weightline.chain import open_chain
from weightline.cli.output import Bucket, Json, emit, percent, size, table
from weightline.format.manifest import Manifest


def run(
    bucket: Bucket,
    limit: Annotated[int, typer.Option(min=1, help="Newest versions to show.")] = 1_000_000,
    as_json: Json = False,
) -> None:
    """List the versions of a chain, newest first."""
    chain = open_chain(bucket)
    versions = chain.versions()[-limit:]
    manifests = [chain.manifest(version) for version in reversed(versions)]
    rows = [
        (m.version, m.kind, m.stage, m.global_step, percent(m.num_changed, m.num_elements), size(m.payload_nbytes),
         percent(m.payload_nbytes, m.full_nbytes), m.created_at)
        for m in manifests
    ]  # fmt: skip
    header = ("version", "kind", "stage", "step", "changed", "bytes", "of full", "committed")
    emit({"versions": [summary(m) for m in manifests]}, table(header, rows), as_json=as_json)


def summary(manifest: Manifest) -> dict[str, Any]:
    """The manifest without its tensors and payloads."""
    return manifest.model_dump(exclude={"tensors", "payloads", "assets", "features", "format"})
