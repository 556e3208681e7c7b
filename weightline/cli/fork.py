"""weightline fork BUCKET NEW_BUCKET: a new chain from a version."""

from __future__ import annotations

from typing import Annotated

import typer

from weightline.chain import open_chain
from weightline.chain.read.refs import resolve
from weightline.chain.write.standalone import commit_fork
from weightline.cli.commit import report
from weightline.cli.output import Bucket, Json


def run(
    bucket: Bucket,
    new_bucket: Annotated[str, typer.Argument(help="URL of the new, empty chain.")],
    version: Annotated[str, typer.Option(help="A number, 'tip', or the name of a ref.")] = "tip",
    as_json: Json = False,
) -> None:
    """Start a new chain whose version 0 is a version of this one."""
    chain = open_chain(bucket)
    report(commit_fork(chain, resolve(chain, version), open_chain(new_bucket)), as_json)
