"""Bars are for terminals: nothing is added to what programs read."""

from __future__ import annotations

import errno
import os
import pty
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.store.racers import write_checkpoint_folder
from tests.waiting import PATIENCE_SECONDS


@pytest.mark.process
@pytest.mark.parametrize("is_terminal", [True, False], ids=["terminal", "pipe"])
def test_commit_and_pull_show_bytes_on_a_terminal_only(tmp_path: Path, is_terminal: bool) -> None:
    folder = write_checkpoint_folder(tmp_path / "checkpoint", 0)
    bucket = str(tmp_path / "bucket")
    for verb in (["commit", bucket, str(folder)], ["pull", bucket, "--out", str(tmp_path / "out")]):
        shown = _stderr_of([*verb, "--json"], is_terminal)
        assert ({"commit": b"committing", "pull": b"pulling"}[verb[0]] in shown) == is_terminal
        assert bool(shown) == is_terminal


def _stderr_of(verb: list[str], is_terminal: bool) -> bytes:
    argv = [sys.executable, "-m", "weightline.cli.main", *verb]
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "120"}
    if not is_terminal:
        return subprocess.run(argv, capture_output=True, check=True, timeout=PATIENCE_SECONDS, env=environment).stderr
    ours, theirs = pty.openpty()
    with ThreadPoolExecutor(1) as reader:
        shown = reader.submit(_read_to_the_end, ours)
        try:
            subprocess.run(
                argv, stdout=subprocess.DEVNULL, stderr=theirs, check=True, timeout=PATIENCE_SECONDS, env=environment
            )
        finally:
            os.close(theirs)
    return shown.result()


def _read_to_the_end(terminal: int) -> bytes:
    """While it is written: a terminal holds no more than some thousand bytes that nobody reads."""
    shown = b""
    with os.fdopen(terminal, "rb", buffering=0) as file:
        try:
            while piece := file.read(4096):
                shown += piece
        except OSError as error:
            if error.errno != errno.EIO:  # the other side is closed
                raise
    return shown
