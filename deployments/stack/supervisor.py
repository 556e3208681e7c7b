"""Starting the process that keeps a stack up (`weightline stay`), and waiting until it has."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from weightline.deployments.stack.registry import SUPERVISOR, StackFacts, StackProcess
from weightline.deployments.stack.stack import StackFolder, free_port, running_stack
from weightline.errors import LaunchError
from weightline.launch.processes import start_process

_UP_SECONDS = 300.0


def start_supervisor(folder: StackFolder, port: int) -> StackFacts:
    """Start it, for good, and return the stack's facts once all of it is up and deployed.

    LaunchError with its last lines when it ended instead; then, and when this process is interrupted, nothing is left.
    """
    folder.log_dir.mkdir(parents=True, exist_ok=True)
    log_path = folder.log_dir / f"{SUPERVISOR}.log"
    runs_dir = str(folder.root.parent)
    argv = [sys.executable, "-m", "weightline", "stay", "--runs-dir", runs_dir, "--port", str(free_port(port))]
    with log_path.open("ab") as log:
        process = start_process(argv, stdout=log, stderr=subprocess.STDOUT, dies_with_parent=False)
    itself = StackProcess.of(SUPERVISOR, process.pid)
    try:
        return _wait_until_up(folder, process, log_path)
    except BaseException:
        itself.ask_to_end(_UP_SECONDS)
        raise


def _wait_until_up(folder: StackFolder, process: subprocess.Popen[bytes], log_path: Path) -> StackFacts:
    """The dashboard is the last to be started."""
    deadline = time.monotonic() + _UP_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            tail = log_path.read_text(errors="replace").splitlines()[-15:]
            told = "\n    ".join(["the stack did not come up. The supervisor's last lines:", *tail])
            raise LaunchError(told, returncode=process.returncode, tail=tail)
        facts = running_stack(folder)
        if facts is not None and facts.dashboard_url is not None:
            return facts
        time.sleep(0.2)
    raise LaunchError(f"the stack did not come up in {_UP_SECONDS:.0f} s: see {log_path}", name=SUPERVISOR)
