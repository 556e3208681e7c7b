"""`python -m weightline.flows run | up | down | deploy`: pipelines and the local stack."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Annotated

import httpx
import typer
from rich.console import Console

from weightline.deployments.stack.pipeline import bring_down, bring_up, deploy_everything, run_pipeline, stay_up
from weightline.deployments.stack.stack import DEFAULT_PORT
from weightline.errors import WeightlineError

app = typer.Typer(help=__doc__, add_completion=False, no_args_is_help=True)
# Without a terminal (a log, a pipe) lines are for reading later: let them be long.
console = Console(width=None if sys.stdout.isatty() else 160)

INTERRUPTED = 130
DEFAULT_RECIPE = Path("deployments/recipes/arithmetic.yaml")
RunsDir = Annotated[Path, typer.Option(help="Folder of all runs and of the stack.", file_okay=False)]
Port = Annotated[int, typer.Option(help="Port of the Prefect server; another one if it is taken.", min=0, max=65535)]


@app.command()
def run(
    recipe: Annotated[Path | None, typer.Option(help=f"Recipe to train; {DEFAULT_RECIPE} for a new run.")] = None,
    runs_dir: RunsDir = Path("runs"),
    resume: Annotated[str | None, typer.Option(help="Id of a run to go on with.")] = None,
    port: Port = DEFAULT_PORT,
) -> None:
    """Train a recipe's stages, evaluate and serve every version, and sum up."""
    chosen = recipe if resume or recipe else DEFAULT_RECIPE
    run_pipeline(chosen, runs_dir, resume, Path.cwd(), console, port)


@app.command()
def up(runs_dir: RunsDir = Path("runs"), port: Port = DEFAULT_PORT) -> None:
    """Start Prefect, the runner and the deployments, and leave them running."""
    console.print(f"up: {bring_up(runs_dir, Path.cwd(), console, port)}", highlight=False)


@app.command(hidden=True)
def stay(runs_dir: RunsDir = Path("runs"), port: Port = DEFAULT_PORT) -> None:
    """Be the process that `up` leaves behind: keep the stack up until SIGTERM."""
    stay_up(runs_dir, Path.cwd(), console, port)


@app.command()
def down(runs_dir: RunsDir = Path("runs")) -> None:
    """End what `up` started."""
    console.print("down" if bring_down(runs_dir) else "nothing was up")


@app.command()
def deploy(runs_dir: RunsDir = Path("runs")) -> None:
    """Make a Prefect server know every flow: the one of PREFECT_API_URL, else the stack that is up."""
    console.print(f"deployed to {deploy_everything(runs_dir, Path.cwd())}", highlight=False, soft_wrap=True)


def main() -> int:
    """The command line. 0: done; 1: failed, with one message; 2: wrong usage; 130: interrupted."""
    errors = Console(stderr=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        app()
    # Beside our own errors, what a folder or a Prefect server answers: a disk that is full, a password that is wrong.
    except (WeightlineError, OSError, httpx.HTTPError) as error:
        errors.print(f"error: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
        return 1
    except SystemExit as end:
        if end.code == INTERRUPTED:
            errors.print("interrupted: everything was ended", style="red")
        return int(end.code or 0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
