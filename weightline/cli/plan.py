"""weightline plan BUCKET --from A --to B: what a reader would fetch."""

from __future__ import annotations

from typing import Annotated

import typer

from weightline.chain import open_chain
from weightline.chain.read.refs import resolve
from weightline.chain.replay.plan import plan_between
from weightline.cli.output import Bucket, Json, emit, size, table


def run(
    bucket: Bucket,
    start: Annotated[str, typer.Option("--from", help="The version at hand; 'nothing' for a late joiner.")] = "nothing",
    to: Annotated[str, typer.Option("--to", help="The version that is wanted.")] = "tip",
    as_json: Json = False,
) -> None:
    """Print the cheapest way from one version to another, backwards too. Fetches no payload."""
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
            size(hop.payload_nbytes),
            "backward" if hop.is_backward else "shortcut" if hop.is_shortcut else "",
        )
        for hop in found.hops
    ]
    total = f"{len(hops)} hops, {found.num_objects} objects, {size(found.payload_nbytes)}"
    emit(document, [*table(("from", "to", "objects", "bytes", ""), rows), total], as_json=as_json)
