"""weightline pull BUCKET --version N --out DIR: a version as a Hugging Face checkpoint folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from weightline.chain import open_chain
from weightline.chain.files.checkpoint import write_checkpoint
from weightline.chain.read.refs import resolve
from weightline.chain.replay.plan import plan_between
from weightline.cli.output import Bucket, Json, emit
from weightline.cli.progress import transferring


def run(
    bucket: Bucket,
    out: Annotated[Path, typer.Option(help="New folder for the checkpoint.")],
    version: Annotated[str, typer.Option(help="A number, 'tip', or the name of a ref.")] = "tip",
    as_json: Json = False,
) -> None:
    """Write a version as a checkpoint folder that transformers loads; every tensor's digest is checked."""
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
