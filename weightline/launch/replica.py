"""A replica as a process of this machine: for the rollouts of a stage, and for a local stack.

It is tied to the process that it works for, so that it ends with it, also when that one is killed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from weightline.chain import open_chain
from weightline.errors import InputError, LaunchError
from weightline.launch.processes import ProcessTree, start_process
from weightline.serving.http.auth import load_token
from weightline.serving.http.client import read_address

LOG = "replica.log"
#: Environment variable: a Python whose environment has vLLM and weightline.
VLLM_PYTHON_VARIABLE = "WEIGHTLINE_VLLM_PYTHON"
#: What `make test-vllm` makes in a checkout.
_VLLM_PYTHON = Path(__file__).absolute().parents[2] / ".venv-vllm" / "bin" / "python"
_HAS_VLLM = "import importlib.util as u, sys; sys.exit(not (u.find_spec('vllm') and u.find_spec('weightline')))"
#: For a start in seconds, and for a machine that trains and evaluates as well.
_VLLM_OPTIONS = ("--enforce-eager", "--max-num-seqs", "32", "--kv-cache-memory-bytes", str(2**30))
_NUM_RESTARTS = 3


def find_vllm_python() -> Path | None:
    """Returns a Python that can serve by vLLM, of WEIGHTLINE_VLLM_PYTHON or of the checkout; None without one."""
    named = os.environ.get(VLLM_PYTHON_VARIABLE)
    python = Path(named).absolute() if named else _VLLM_PYTHON
    try:
        done = subprocess.run([str(python), "-c", _HAS_VLLM], capture_output=True, check=False)
    except OSError:
        return None
    return python if done.returncode == 0 else None


def require_vllm_python() -> Path:
    """Returns what `find_vllm_python` finds. InputError where it finds none."""
    python = find_vllm_python()
    if python is None:
        looked_at = os.environ.get(VLLM_PYTHON_VARIABLE) or _VLLM_PYTHON
        raise InputError(
            f"engine: {looked_at} is no Python with vLLM and weightline: set {VLLM_PYTHON_VARIABLE}, or run "
            "`make test-vllm` in a checkout, which installs one",
            field="engine",
        )
    return python


def replica_argv(chain_url: str, state_dir: Path, options: Sequence[str], vllm_python: Path | None = None) -> list[str]:
    """Returns the command line of a chain's replica: of the embedded server, or of vLLM by that Python. Pure."""
    options = ["--follow", chain_url, "--state-dir", str(state_dir), *options]
    if vllm_python is None:
        return [sys.executable, "-m", "weightline", "serve", "transformers", *options]
    name = open_chain(chain_url).name
    return [str(vllm_python), "-m", "weightline", "serve", "vllm", name, *options, *_VLLM_OPTIONS]


def start_replica(
    chain_url: str,
    state_dir: Path,
    owner: int,
    *options: str,
    dies_with_parent: bool,
    vllm_python: Path | None = None,
) -> subprocess.Popen[bytes]:
    """Starts `weightline serve`, which ends at the latest with the process `owner`.

    It writes its address to the state folder, and its output to a log there. `dies_with_parent`: it ends with the
    thread that starts it as well. `vllm_python`: vLLM serves, by this Python, instead of the embedded server.
    """
    state_dir.mkdir(parents=True, exist_ok=True)
    (state_dir / "address.json").unlink(missing_ok=True)
    argv = [sys.executable, "-m", "weightline.launch.tether", str(owner)]
    argv += replica_argv(chain_url, state_dir, options, vllm_python)
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
