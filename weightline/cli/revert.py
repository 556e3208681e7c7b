"""weightline revert BUCKET VERSION: a new version equal to an old one."""

from __future__ import annotations

from typing import Annotated

import typer

from weightline.chain import open_chain
from weightline.chain.read.refs import resolve
from weightline.chain.write.standalone import commit_revert
from weightline.cli.commit import report
from weightline.cli.output import Bucket, Json


def run(
    bucket: Bucket,
    version: Annotated[str, typer.Argument(help="The version to go back to: a number or a ref.")],
    as_json: Json = False,
) -> None:
    """Commit a version whose bits equal those of an earlier one, made from the chain alone."""
    chain = open_chain(bucket)
    report(commit_revert(chain, resolve(chain, version)), as_json)
