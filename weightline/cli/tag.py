"""weightline tag BUCKET NAME: names for versions."""

from __future__ import annotations

from typing import Annotated

import typer

from weightline.chain import open_chain
from weightline.chain.read.refs import current_refs, move_ref, resolve
from weightline.cli.output import Bucket, Json, emit, table


def run(
    bucket: Bucket,
    name: Annotated[str | None, typer.Argument(help="The name; without it, names are listed.")] = None,
    version: Annotated[str, typer.Option(help="A number, 'tip', or another name.")] = "tip",
    move: Annotated[bool, typer.Option("--move", help="A ref that may be moved later, instead of a tag.")] = False,
    as_json: Json = False,
) -> None:
    """Name a version, or list the names. A tag never moves; one made with --move may, until it is named without."""
    chain = open_chain(bucket)
    if name is not None:
        move_ref(chain, name, resolve(chain, version), is_tag=not move)
    refs = sorted(current_refs(chain).values(), key=lambda ref: ref.name)
    rows = [(ref.name, ref.version, "tag" if ref.is_tag else "ref", ref.created_at) for ref in refs]
    emit(
        {"refs": [ref.model_dump() for ref in refs]}, table(("name", "version", "kind", "since"), rows), as_json=as_json
    )
