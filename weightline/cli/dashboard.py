"""weightline dashboard BUCKET...: chains in the browser."""

from __future__ import annotations

from typing import Annotated

import typer

from weightline.dashboard.buckets import find_chains
from weightline.errors import InputError


def run(
    buckets: Annotated[
        list[str],
        typer.Argument(metavar="BUCKET...", help="URLs that name chains, or local folders that hold some."),
    ],
    host: Annotated[str, typer.Option(help="Address to listen on. There is no login: keep it on this machine.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 4300,
    prefect_ui: Annotated[str | None, typer.Option(help="URL of a Prefect UI: runs link to it.")] = None,
) -> None:
    """Show chains as a graph with curves, versions and comparisons. Reads the buckets and nothing else."""
    find_chains(buckets)
    try:
        from weightline.dashboard.serve import listen, serve
    except ModuleNotFoundError as error:
        raise InputError(f"the dashboard needs {error.name}: pip install 'weightline[dashboard]'") from error
    with listen(host, port) as listener:
        typer.echo(f"http://{host}:{port}")
        serve(buckets, listener, host=host, prefect_ui=prefect_ui)
