"""Flows that the warm runner's tests let it run."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

from prefect import flow
from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY


@flow(name="toy-tell")
def tell(path: str) -> None:
    """Say which process ran this."""
    with Path(path).open("a") as file:
        file.write(f"{os.getpid()}\n")


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
    """Say when this began and ended, and what TOY_WORD was."""
    for moment in ("begun", "ended"):
        with Path(path).open("a") as file:
            file.write(f"{moment} {os.environ.get('TOY_WORD')} {PREFECT_FLOWS_HEARTBEAT_FREQUENCY.value()}\n")
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
