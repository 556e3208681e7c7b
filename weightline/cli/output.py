"""Shared parts of all commands: common options, output as text or as one JSON document, progress bars, error lines."""

from __future__ import annotations

import json
import shutil
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
Version = Annotated[str | None, typer.Argument(metavar="VERSION", help="A number, 'tip', or the name of a ref.")]
VersionOption = Annotated[str | None, typer.Option("--version", metavar="VERSION", help="Same as the argument.")]
#: Longest cell of a table, and longest line of other text.
MAX_CELL = 120
MAX_LINE = 1000
#: Equals that of weightline.chain.write.standalone, which a help text shall not import.
DEFAULT_CODING = "gap-by-magnitude"


def emit(document: dict[str, Any], text: Iterable[str], *, as_json: bool) -> None:
    """Prints the document as JSON, or the lines of text."""
    if as_json:
        typer.echo(json.dumps(document, indent=1, default=str))
    else:
        for line in text:
            typer.echo(line)


def one_version(argument: str | None, option: str | None, default: str | None = None) -> str:
    """Returns the version that a command names, as its argument or with --version. Usage error for both, or neither."""
    if argument is not None and option is not None:
        raise typer.BadParameter("name the version once: as the argument or with --version", param_hint="VERSION")
    named = argument if option is None else option
    if named is None:
        named = default
    if named is None:
        raise typer.BadParameter("name a version: as the argument or with --version", param_hint="VERSION")
    return named


def screenful() -> int:
    """Returns how many rows of a table a terminal shows beside its prompt, header and last line; 20 without one."""
    return max(5, shutil.get_terminal_size((80, 24)).lines - 4)


def warn(problems: Iterable[str]) -> None:
    """Prints what could not be read to stderr, where it is no part of a document."""
    for problem in problems:
        typer.echo(f"warning: {printable(problem, MAX_LINE)}", err=True)


def printable(text: str, max_length: int = MAX_CELL) -> str:
    """Returns the text as one line that any terminal can show: writers of manifests choose labels freely."""
    line = "".join(c if c.isprintable() else "?" for c in text[: max_length + 1])
    return line if len(line) <= max_length else f"{line[: max_length - 3]}..."


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Returns lines with aligned columns. Columns of numbers are aligned to the right."""
    cells = [[printable(str(cell)) for cell in row] for row in rows]
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
        typer.echo(f"error ({kind}): {printable(' '.join(str(error).split()), MAX_LINE)}", err=True)
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
