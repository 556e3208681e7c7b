"""The inference server of a local stack: one process, for the chain that was trained last.

The first refresh that needs it starts it: `weightline serve transformers`, or `weightline serve vllm` in a stack of
`weightline up --engine vllm`. It writes its address to its state folder, where later refreshes in other processes find
it. It ends with the worker of those refreshes.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from weightline.chain import open_chain
from weightline.errors import ApplyError, LaunchError
from weightline.files import exclusive_lock, write_atomically
from weightline.launch.processes import WORKER_PID_VARIABLE, ProcessId
from weightline.launch.replica import LOG, ended_error, start_replica
from weightline.lineage.text import slug
from weightline.serving.http import client
from weightline.serving.http.auth import load_token

#: Environment variable that a local stack sets: the folder of its replicas' state.
REPLICAS_DIR_VARIABLE = "WEIGHTLINE_REPLICAS_DIR"
#: Environment variable that a local stack sets: the Python by which vLLM serves. Empty for the embedded server.
REPLICA_PYTHON_VARIABLE = "WEIGHTLINE_REPLICA_PYTHON"
#: vLLM takes a minute on an idle machine.
_START_SECONDS = {"embedded": 180.0, "vllm": 600.0}
_PROCESS = "process.json"
#: Children of this process. Python warns of a child that runs while no variable refers to it.
_started: list[subprocess.Popen[bytes]] = []


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
    """Returns the chain's replica, and starts it when it does not run. Replicas of other chains end, to bound memory.

    LaunchError with the server's last lines when it does not start. Safe to repeat.
    """
    state_dir = folder / slug(open_chain(chain_url).name)
    state_dir.mkdir(parents=True, exist_ok=True)
    token = load_token(state_dir)
    with exclusive_lock(folder / "start.lock", waits=True):
        process = _recorded_process(state_dir)
        url = client.read_address(state_dir) if process is not None and process.is_alive() else None
        if url is None or not _answers(url, timeout_seconds=30.0):
            end_replicas(folder)
            url = _wait_for_url(_start(chain_url, state_dir), state_dir)
    return ReplicaAddress(url, token)


def end_replicas(folder: Path) -> None:
    """Ends every replica that was started in the folder. Safe to repeat."""
    for path in folder.glob(f"*/{_PROCESS}"):
        process = _recorded_process(path.parent)
        if process is not None:
            process.end()
        path.unlink(missing_ok=True)


def _start(chain_url: str, state_dir: Path) -> subprocess.Popen[bytes]:
    owner = int(os.environ.get(WORKER_PID_VARIABLE, os.getpid()))
    process = start_replica(
        chain_url, state_dir, owner, "--every", "0", "--port", "0", dies_with_parent=False, vllm_python=_vllm_python()
    )
    _started.append(process)
    write_atomically(state_dir / _PROCESS, json.dumps(asdict(ProcessId.of(process.pid))))
    return process


def _vllm_python() -> Path | None:
    python = os.environ.get(REPLICA_PYTHON_VARIABLE)
    return Path(python) if python else None


def _recorded_process(state_dir: Path) -> ProcessId | None:
    try:
        return ProcessId(**json.loads((state_dir / _PROCESS).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _wait_for_url(process: subprocess.Popen[bytes], state_dir: Path) -> str:
    start_seconds = _START_SECONDS["embedded" if _vllm_python() is None else "vllm"]
    deadline = time.monotonic() + start_seconds
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise ended_error(state_dir, process.returncode)
        url = client.read_address(state_dir)
        if url is not None and _answers(url, timeout_seconds=2.0):
            return url
        time.sleep(0.1)
    raise LaunchError(f"the inference server did not start within {start_seconds:.0f} s: see {state_dir / LOG}")


def _answers(url: str, timeout_seconds: float) -> bool:
    try:
        client.status(url, timeout_seconds=timeout_seconds)
    except ApplyError:
        return False
    return True
