"""Flows that the warm worker's tests let it run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from prefect import flow
from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY


@flow(name="toy-tell")
def tell(path: str) -> None:
    """Write down which process runs this, and what it finds there."""
    facts = {
        "pid": os.getpid(),
        "parent": os.getppid(),
        "working_dir": str(Path.cwd()),
        "word": os.environ.get("TOY_WORD"),
        "path_is_set": "PATH" in os.environ,
        "heartbeat_seconds": PREFECT_FLOWS_HEARTBEAT_FREQUENCY.value(),
        "found_toys": hasattr(sys, "_weightline_toy"),
    }
    sys._weightline_toy = True  # type: ignore[attr-defined]
    os.environ["TOY_WORD"] = "left behind"
    with Path(path).open("a") as file:
        file.write(f"{json.dumps(facts)}\n")


@flow(name="toy-fail")
def fail() -> None:
    """End badly, as flows do."""
    raise ValueError("the toy broke")


@flow(name="toy-die")
def die() -> None:
    """Take the process along."""
    os._exit(7)


@flow(name="toy-hold")
def hold(path: str) -> None:
    """Say when this began and ended."""
    for moment in ("begun", "ended"):
        with Path(path).open("a") as file:
            file.write(f"{moment}\n")
        time.sleep(0.5)


@flow(name="toy-hang")
def hang(path: str) -> None:
    """Let a subflow hang."""
    wait_for_good(path)


@flow(name="toy-wait")
def wait_for_good(path: str) -> None:
    """Start a process in a session of its own, and wait for good."""
    child = subprocess.Popen(["sleep", "300"], start_new_session=True)
    Path(path).write_text(str(child.pid))
    time.sleep(300)
