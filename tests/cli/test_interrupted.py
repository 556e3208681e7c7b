"""A verb that is told to end while it works."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.store.racers import write_checkpoint_folder
from tests.waiting import PATIENCE_SECONDS
from weightline.chain.read.history import Chain
from weightline.store.local import LocalStore

_PROGRAM = """
import sys, time
import weightline.chain.write.standalone as author
from weightline.cli.main import main

write = author.write_anchor

def write_and_wait(*arguments):
    write(*arguments)
    print("written", flush=True)
    time.sleep(60)

author.write_anchor = write_and_wait
sys.argv = ["weightline", "commit", *sys.argv[1:]]
main()
"""


@pytest.mark.process
def test_sigterm_leaves_no_temporary_files(tmp_path: Path) -> None:
    folder = write_checkpoint_folder(tmp_path / "checkpoint", 0)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    argv = [sys.executable, "-c", _PROGRAM, str(tmp_path / "bucket"), str(folder)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, env=os.environ | {"TMPDIR": str(scratch)}) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == b"written\n"
            assert len(list(scratch.glob("weightline-*/*"))) > 0
            process.terminate()
            assert process.wait(timeout=PATIENCE_SECONDS) == 128 + signal.SIGTERM
        finally:
            process.kill()
    assert list(scratch.glob("weightline-*")) == []
    assert list((tmp_path / "bucket" / ".staging").iterdir()) == []
    assert Chain(LocalStore(tmp_path / "bucket")).tip_version() is None
