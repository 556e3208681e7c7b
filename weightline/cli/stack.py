"""weightline run | up | down | deploy: pipelines under Prefect, on one machine or on an existing server."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from weightline.deployments.stack import DEFAULT_PORT, Engine
from weightline.errors import LaunchError
from weightline.extras import check_installed

if TYPE_CHECKING:
    from rich.console import Console

INTERRUPTED = 130
DEFAULT_RECIPE = "arithmetic"

RunsDir = Annotated[Path, typer.Option(help="Folder of all runs and of the stack.", file_okay=False)]
Port = Annotated[int, typer.Option(help="Port of the Prefect server; another one if it is taken.", min=0, max=65535)]
Recipe = Annotated[
    str | None,
    typer.Argument(
        metavar="RECIPE",
        help=f"Path of a recipe file, or name of a recipe that comes with weightline. [default: {DEFAULT_RECIPE}]",
    ),
]


def run(
    recipe: Recipe = None,
    recipe_option: Annotated[str | None, typer.Option("--recipe", hidden=True)] = None,
    runs_dir: RunsDir = Path("runs"),
    resume: Annotated[str | None, typer.Option(metavar="RUN", help="Id of a run to resume.")] = None,
    port: Port = DEFAULT_PORT,
) -> None:
    """Train a recipe's stages, evaluate and serve every version, and print a summary.

    Exit code 0 when all of it succeeded, 1 after a failure, 2 for wrong usage, 130 after an interrupt.
    """
    if recipe is not None and recipe_option is not None:
        raise typer.BadParameter("name the recipe once: as the argument or with --recipe", param_hint="RECIPE")
    named = recipe if recipe is not None else recipe_option
    # What a variable of a shell that is not set leaves. It must not start another training than the one that was meant.
    if named == "":
        raise typer.BadParameter("it is empty: name a recipe, or leave it out", param_hint="RECIPE")
    if resume == "":
        raise typer.BadParameter("it is empty: name the run to resume, or leave it out", param_hint="--resume")
    check_installed("train", "prefect", "eval", "serve")
    with _stack_errors():
        from weightline.deployments.stack.pipeline import run_pipeline

        run_pipeline(named if named or resume else DEFAULT_RECIPE, runs_dir, resume, _console(), port)


def up(
    runs_dir: RunsDir = Path("runs"),
    port: Port = DEFAULT_PORT,
    engine: Annotated[
        Engine | None,
        typer.Option(
            help="Inference server: the embedded one, or vLLM of the Python that WEIGHTLINE_VLLM_PYTHON names, or of "
            ".venv-vllm in a checkout. [default: embedded]"
        ),
    ] = None,
) -> None:
    """Start a Prefect server, a worker and the dashboard, deploy every flow, and leave all of it running."""
    check_installed("prefect", "dashboard")
    with _stack_errors():
        from weightline.deployments.stack.up_and_down import bring_up

        typer.echo(f"up: {bring_up(runs_dir, _console(), port, engine)}")


def stay(
    runs_dir: RunsDir = Path("runs"),
    port: Port = DEFAULT_PORT,
    engine: Annotated[Engine, typer.Option(help="Inference server.")] = Engine.EMBEDDED,
) -> None:
    """Run the supervisor that `up` leaves behind: it keeps the stack up until SIGTERM."""
    check_installed("prefect", "dashboard")
    with _stack_errors():
        from weightline.deployments.stack.up_and_down import stay_up

        stay_up(runs_dir, _console(), port, engine)


def down(runs_dir: RunsDir = Path("runs")) -> None:
    """End every process that `up` started."""
    check_installed("prefect")
    with _stack_errors():
        from weightline.deployments.stack.up_and_down import bring_down

        typer.echo("down" if bring_down(runs_dir) else "nothing was up")


def deploy(runs_dir: RunsDir = Path("runs")) -> None:
    """Deploy every flow to a Prefect server: the one of PREFECT_API_URL, else the stack that is up."""
    check_installed("prefect")
    with _stack_errors():
        from weightline.deployments.stack.up_and_down import deploy_everything

        typer.echo(f"deployed to {deploy_everything(runs_dir)}")


@contextmanager
def _stack_errors() -> Iterator[None]:
    """Treats SIGTERM as Ctrl-C, which gives exit code 130, and an error of the Prefect server as a LaunchError."""
    import httpx

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        typer.echo("interrupted: all processes were ended", err=True)
        raise typer.Exit(INTERRUPTED) from None
    except httpx.HTTPError as error:
        raise LaunchError(f"a request to the Prefect server failed: {error}") from error


def _console() -> Console:
    """Returns the terminal's console. For a file or a pipe, lines may have up to 160 characters."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 160)
