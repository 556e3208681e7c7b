"""Shared parts of all commands: common options, output as text or as one JSON document, progress bars, error lines."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, NoReturn

import typer

from weightline.errors import WeightlineError

Bucket = Annotated[
    str, typer.Argument(metavar="BUCKET", help="URL that names a chain, as in file:///data/bucket/model.")
]
Json = Annotated[bool, typer.Option("--json", help="One JSON document instead of text.")]
Coding = Annotated[str, typer.Option(help="Coding of payloads: gap or gap-by-magnitude.")]
#: Equals that of weightline.chain.write.standalone, which a help text shall not import.
DEFAULT_CODING = "gap-by-magnitude"


def emit(document: dict[str, Any], text: Iterable[str], *, as_json: bool) -> None:
    """Prints the document as JSON, or the lines of text."""
    if as_json:
        typer.echo(json.dumps(document, indent=1, default=str))
    else:
        for line in text:
            typer.echo(line)


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Returns lines with aligned columns. Columns of numbers are aligned to the right."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in [list(header), *cells]) for i in range(len(header))]
    right = [bool(cells) and all(row[i][:1].isdigit() or row[i] == "-" for row in cells) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        parts = [c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)]
        return "  ".join(parts).rstrip()

    return [line(header), *(line(row) for row in cells)]


def percent(part: int, whole: int) -> str:
    """Formats a share as in 1.234 %."""
    return f"{100 * part / whole:.3f} %" if whole else "-"


def fail(error: WeightlineError | OSError) -> NoReturn:
    """Prints the error with its stable kind to stderr, and exits with code 1.

    An OSError comes from a local folder: a full disk, a missing permission. Its kind is `os`.
    """
    kind, facts = ("os", {}) if isinstance(error, OSError) else (error.kind, error.facts)
    if "--json" in sys.argv:
        texts = {name: str(value) for name, value in facts.items()}
        typer.echo(json.dumps({"error": {"kind": kind, "message": str(error), "facts": texts}}), err=True)
    else:
        typer.echo(f"error ({kind}): {error}", err=True)
    raise SystemExit(1)


@contextmanager
def transferring(what: str, total_nbytes: Callable[[], int] | None = None) -> Iterator[None]:
    """Shows a progress bar of all bytes transferred to or from buckets during the block.

    Shows nothing when standard error is not a terminal. `total_nbytes` is called only when the bar is shown.
    """
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    from weightline.store.transfers import watching

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=None if total_nbytes is None else total_nbytes())
        with watching(lambda nbytes: progress.advance(task, nbytes)):
            yield
