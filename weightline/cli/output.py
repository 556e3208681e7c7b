"""How verbs speak: a table or lines for people, one JSON document for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, NoReturn

import typer

from weightline.errors import WeightlineError

Bucket = Annotated[
    str, typer.Argument(metavar="BUCKET", help="URL that names a chain, as in file:///data/bucket/model.")
]
Json = Annotated[bool, typer.Option("--json", help="One JSON document instead of text.")]


def emit(document: dict[str, Any], text: Iterable[str], *, as_json: bool) -> None:
    """Print the document, or the lines."""
    if as_json:
        typer.echo(json.dumps(document, indent=1, default=str))
    else:
        for line in text:
            typer.echo(line)


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Aligned columns, numbers to the right."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in [list(header), *cells]) for i in range(len(header))]
    right = [bool(cells) and all(row[i][:1].isdigit() or row[i] == "-" for row in cells) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        parts = [c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)]
        return "  ".join(parts).rstrip()

    return [line(header), *(line(row) for row in cells)]


def size(nbytes: float) -> str:
    """Bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} TB"


def percent(part: int, whole: int) -> str:
    """A share for people."""
    return f"{100 * part / whole:.3f} %" if whole else "-"


def fail(error: WeightlineError | OSError) -> NoReturn:
    """Prints what was wrong to stderr, with its stable kind, and ends with exit code 1.

    An OSError is what a local folder answered: a full disk, a missing permission. Its kind is `os`.
    """
    kind, facts = ("os", {}) if isinstance(error, OSError) else (error.kind, error.facts)
    if "--json" in sys.argv:
        texts = {name: str(value) for name, value in facts.items()}
        typer.echo(json.dumps({"error": {"kind": kind, "message": str(error), "facts": texts}}), err=True)
    else:
        typer.echo(f"error ({kind}): {error}", err=True)
    raise SystemExit(1)
