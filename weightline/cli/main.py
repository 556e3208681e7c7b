"""The command line: one file a verb. Nothing here imports torch; heavy rooms are imported when their verb runs."""

from __future__ import annotations

import signal
import sys

import typer

from weightline.cli import (
    bench,
    commit,
    compact,
    dashboard,
    diff,
    expire,
    fork,
    gc,
    keygen,
    log,
    plan,
    plan_cluster,
    pull,
    revert,
    serve,
    show,
    sign,
    stack,
    tag,
    verify,
)
from weightline.cli.output import fail
from weightline.errors import WeightlineError

app = typer.Typer(
    name="weightline",
    help="Post-training in which every weight update is a commit. BUCKET is a URL that names a chain: "
    "file:///data/bucket/my-model, or a plain path.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for verb in (
    log,
    show,
    diff,
    pull,
    commit,
    revert,
    fork,
    tag,
    compact,
    expire,
    gc,
    verify,
    keygen,
    sign,
    plan,
    plan_cluster,
    dashboard,
):
    app.command(name=verb.__name__.rpartition(".")[2].replace("_", "-"))(verb.run)
for stack_verb in (stack.run, stack.up, stack.down, stack.deploy):
    app.command(name=stack_verb.__name__)(stack_verb)
app.command(name="stay", hidden=True)(stack.stay)
app.add_typer(bench.app, name="bench")
app.add_typer(serve.app, name="serve")


def main() -> None:
    """Runs the command line. A WeightlineError or OSError is one line on stderr and exit code 1; wrong usage is 2.

    SIGTERM leaves through the `finally`s too, which remove temporary files: exit code 143.
    """
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        app()
    except (WeightlineError, OSError) as error:
        fail(error)


if __name__ == "__main__":
    main()
