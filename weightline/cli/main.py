"""The `weightline` command. Subcommands import their modules when they run, so that help texts are fast."""

from __future__ import annotations

import signal
import sys
from typing import Annotated

import typer

from weightline import __version__
from weightline.cli import bench, read, serve, stack, upkeep, write
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
    *(read.log, read.show, read.diff, read.plan, read.pull),
    *(write.commit, write.revert, write.fork, write.upgrade, write.tag, write.keygen, write.sign),
    *(upkeep.verify, upkeep.compact, upkeep.expire, upkeep.gc, upkeep.repair),
    *(stack.run, stack.up, stack.down, stack.deploy),
    *(serve.dashboard, bench.plan_cluster),
):
    app.command(name=verb.__name__.replace("_", "-"))(verb)
app.command(name="stay", hidden=True)(stack.stay)
app.add_typer(bench.app, name="bench")
app.add_typer(serve.app, name="serve")


def _print_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"weightline {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Runs the command line. A WeightlineError or OSError gives one line on stderr and exit code 1; wrong usage 2.

    SIGTERM runs the `finally` blocks, which remove temporary files, and gives exit code 143.
    """
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        app()
    except (WeightlineError, OSError) as error:
        fail(error)


if __name__ == "__main__":
    main()
