"""Verbs, arguments and flags are a promise: what scripts call today they may call in the next release."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

import weightline
from weightline.chain.write import standalone
from weightline.cli import output
from weightline.cli.main import app

SURFACE = Path(__file__).with_name("surface.txt")
#: What a help text must not import: each takes longer than the whole command line. typer itself imports pydantic.
HEAVY = (
    "torch", "transformers", "prefect", "numba", "numpy", "obstore", "huggingface_hub", "rich", "httpx",
    "psutil", "fastapi", "yaml", "safetensors",
)  # fmt: skip


def _verbs(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command by the words that call it, the program's own options first."""
    yield path, command
    for name, below in sorted(getattr(command, "commands", {}).items()):
        yield from _verbs(below, (*path, name))


def _line(path: tuple[str, ...], command: Any) -> str:
    parameters = [
        f"{parameter.opts[0]}{'' if parameter.required or parameter.nargs != 1 else '?'}"
        if parameter.param_type_name == "argument"
        else " ".join([*parameter.opts, *parameter.secondary_opts]) + ("!" if parameter.required else "")
        for parameter in command.params
    ]
    return " ".join(["weightline", *path, *parameters])


def test_verbs_and_flags_are_those_that_were_decided() -> None:
    """A line that is gone or changed breaks scripts. A new one is a decision: write it into surface.txt."""
    lines = [_line(path, command) for path, command in _verbs(typer.main.get_command(app))]
    assert lines == SURFACE.read_text().splitlines()


@pytest.mark.process
def test_every_help_text_is_there_at_once() -> None:
    """None of them imports what takes long. One process asks for all, so nothing of an earlier test is counted."""
    program = (
        "import sys\n"
        "from weightline.cli.main import app\n"
        "for line in sys.stdin:\n"
        "    try: app([*line.split(), '--help'])\n"
        "    except SystemExit as end: assert not end.code, line\n"
        f"print('HEAVY', sorted(set({HEAVY!r}) & set(sys.modules)))\n"
    )
    verbs = [" ".join(path) for path, _ in _verbs(typer.main.get_command(app))]
    done = subprocess.run(
        [sys.executable, "-c", program], input="\n".join(verbs) + "\n", capture_output=True, text=True, check=True
    )
    assert done.stdout.count("Usage: ") == len(verbs) > 20
    assert done.stdout.splitlines()[-1] == "HEAVY []"


def test_the_default_coding_in_help_texts_is_that_of_the_engine() -> None:
    assert output.DEFAULT_CODING == standalone.DEFAULT_CODING


@pytest.mark.process
def test_version() -> None:
    argv = [sys.executable, "-m", "weightline", "--version"]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    assert done.stdout == f"weightline {weightline.__version__}\n"
