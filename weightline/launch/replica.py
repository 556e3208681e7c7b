"""An embedded replica as a process of this machine: for the rollouts of a stage, and for a local stack.

It is tied to the process that it works for, so that it ends with it, also when that one is killed.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from weightline.errors import LaunchError
from weightline.launch.processes import ProcessTree, start_process
from weightline.serving.http.auth import load_token
from weightline.serving.http.client import read_address

LOG = "replica.log"
_NUM_RESTARTS = 3


def start_replica(
    chain_url: str, state_dir: Path, owner: int, *options: str, dies_with_parent: bool
) -> subprocess.Popen[bytes]:
    """Starts `weightline serve transformers`, which ends at the latest with the process `owner`.

    It writes its address to the state folder, and its output to a log there. `dies_with_parent`: it ends with the
    thread that starts it as well.
    """
    state_dir.mkdir(parents=True, exist_ok=True)
    (state_dir / "address.json").unlink(missing_ok=True)
    argv = [sys.executable, "-m", "weightline.launch.tether", str(owner), sys.executable, "-m", "weightline", "serve"]
    argv += ["transformers", "--follow", chain_url, "--state-dir", str(state_dir), *options]
    with (state_dir / LOG).open("ab") as log:
        return start_process(argv, stdout=log, stderr=subprocess.STDOUT, dies_with_parent=dies_with_parent)


def ended_error(state_dir: Path, returncode: int | None) -> LaunchError:
    """Returns the error of a replica that ended, with the last lines of its log."""
    tail = (state_dir / LOG).read_text(errors="replace").splitlines()[-15:]
    message = f"the inference server ended with exit code {returncode}. Its last lines:"
    return LaunchError("\n    ".join([message, *tail]), returncode=returncode, tail=tail)


@contextmanager
def kept_replica(chain_url: str, state_dir: Path, owner: int, *options: str) -> Iterator[Callable[[], None]]:
    """Runs a replica for the time of the block. Call what it yields often: it starts one that has ended again.

    A replica that is started again listens at the same address. LaunchError when it ends more than three times.
    """
    state_dir.mkdir(parents=True, exist_ok=True)
    load_token(state_dir)  # creates it before anything reads it
    process = start_replica(chain_url, state_dir, owner, "--port", "0", *options, dies_with_parent=True)
    port, num_restarts = "0", 0

    def look() -> None:
        nonlocal process, port, num_restarts
        url = read_address(state_dir)
        port = port if url is None else url.rpartition(":")[2]
        if process.poll() is None:
            return
        if num_restarts == _NUM_RESTARTS:
            raise ended_error(state_dir, process.returncode)
        num_restarts += 1
        process = start_replica(chain_url, state_dir, owner, "--port", port, *options, dies_with_parent=True)

    try:
        yield look
    finally:
        ProcessTree(process.pid).end()
        process.wait()
