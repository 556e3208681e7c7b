"""weightline diff BUCKET A B: where two versions differ."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from weightline.chain import open_chain
from weightline.chain.read.refs import resolve
from weightline.chain.replay.diff import diff_versions
from weightline.cli.output import Bucket, Json, emit, percent, table


def run(
    bucket: Bucket,
    a: Annotated[str, typer.Argument(help="A version, 'tip', or a ref.")],
    b: Annotated[str, typer.Argument(help="A version, 'tip', or a ref.")] = "tip",
    as_json: Json = False,
) -> None:
    """Count the elements of every tensor whose bits differ between two versions."""
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
