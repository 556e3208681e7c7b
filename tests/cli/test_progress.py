"""Bars are for terminals: nothing is added to what programs read."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from tests.store.racers import write_checkpoint_folder


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
        return subprocess.run(argv, capture_output=True, check=True, timeout=120, env=environment).stderr
    ours, theirs = pty.openpty()
    try:
        subprocess.run(argv, stdout=subprocess.DEVNULL, stderr=theirs, check=True, timeout=120, env=environment)
        return os.read(ours, 100_000)
    finally:
        os.close(ours)
        os.close(theirs)
