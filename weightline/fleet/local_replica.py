"""The inference server of a local stack: one process, for the chain that was trained last.

The first refresh that needs it starts it (weightline serve transformers). It writes its address to its state folder,
and ends with the process that started it, a warm worker, which starts it again at the next refresh.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from weightline.chain import open_chain
from weightline.errors import ApplyError, LaunchError
from weightline.launch.processes import end_processes, start_process
from weightline.lineage.text import slug
from weightline.serving.http import client
from weightline.serving.http.auth import load_token

#: Set by a local stack: where its replicas keep their state.
REPLICAS_DIR_VARIABLE = "WEIGHTLINE_REPLICAS_DIR"
_START_SECONDS = 180.0
_LOG = "replica.log"

_running: dict[str, subprocess.Popen[bytes]] = {}


@dataclass(frozen=True, slots=True)
class ReplicaAddress:
    """The URL of a replica, and the token that a refresh of it needs."""

    url: str
    token: str


def replicas_dir() -> Path | None:
    """Returns the local stack's folder of replicas; None when this process belongs to no stack."""
    folder = os.environ.get(REPLICAS_DIR_VARIABLE)
    return Path(folder) if folder else None


def ensure_replica(chain_url: str, folder: Path) -> ReplicaAddress:
    """Returns the chain's replica and starts it if it is not running. Ends a replica of another chain to save memory.

    LaunchError with the server's last lines when it does not come up. Safe to repeat.
    """
    state_dir = folder / slug(open_chain(chain_url).name)
    state_dir.mkdir(parents=True, exist_ok=True)
    token = load_token(state_dir)
    process = _running.get(chain_url)
    url = read_address(state_dir) if process is not None and process.poll() is None else None
    if url is None or not _answers(url, timeout_seconds=30.0):
        end_replicas()
        _running[chain_url] = _start(chain_url, state_dir)
        url = _wait_for_url(_running[chain_url], state_dir)
    return ReplicaAddress(url, token)


def end_replicas() -> None:
    """Ends every replica that this process started."""
    import psutil

    found = [psutil.Process(process.pid) for process in _running.values() if process.poll() is None]
    end_processes(found, grace_seconds=5.0)
    for process in _running.values():
        process.wait()
    _running.clear()


def read_address(state_dir: Path) -> str | None:
    """Returns the URL that a running replica has written, or None."""
    try:
        return str(json.loads((state_dir / "address.json").read_text())["url"])
    except (OSError, ValueError, KeyError):
        return None


def _start(chain_url: str, state_dir: Path) -> subprocess.Popen[bytes]:
    (state_dir / "address.json").unlink(missing_ok=True)
    argv = [sys.executable, "-m", "weightline", "serve", "transformers", "--follow", chain_url, "--every", "0"]
    argv += ["--state-dir", str(state_dir), "--port", "0"]
    with (state_dir / _LOG).open("ab") as log:
        return start_process(argv, stdout=log, stderr=subprocess.STDOUT)


def _wait_for_url(process: subprocess.Popen[bytes], state_dir: Path) -> str:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            tail = (state_dir / _LOG).read_text(errors="replace").splitlines()[-15:]
            message = f"the inference server ended with exit code {process.returncode}. Its last lines:"
            raise LaunchError("\n    ".join([message, *tail]), returncode=process.returncode, tail=tail)
        url = read_address(state_dir)
        if url is not None and _answers(url, timeout_seconds=2.0):
            return url
        time.sleep(0.1)
    raise LaunchError(f"the inference server did not come up in {_START_SECONDS:.0f} s: see {state_dir / _LOG}")


def _answers(url: str, timeout_seconds: float) -> bool:
    try:
        client.status(url, timeout_seconds=timeout_seconds)
    except ApplyError:
        return False
    return True
