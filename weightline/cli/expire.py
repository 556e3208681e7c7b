"""weightline expire BUCKET --before VERSION: let go of old history."""

from __future__ import annotations

from typing import Annotated

import typer

from weightline.chain import open_chain
from weightline.chain.read.refs import oldest_kept, resolve
from weightline.chain.upkeep.retention import expire_before
from weightline.cli.output import Bucket, Json, emit


def run(
    bucket: Bucket,
    before: Annotated[str, typer.Option(help="Keep this version and later ones: a number or a ref.")],
    as_json: Json = False,
) -> None:
    """Move the horizon: versions before it may be collected by gc. Refs and replicas keep what they stand for."""
    chain = open_chain(bucket)
    earlier = oldest_kept(chain)
    horizon = expire_before(chain, resolve(chain, before))
    line = f"oldest kept version: {horizon} (was {earlier}); weightline gc frees the space"
    emit({"oldest_kept": horizon, "was": earlier}, [line], as_json=as_json)
