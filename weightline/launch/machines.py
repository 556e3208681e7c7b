"""Lets several machines train one stage: the first one writes a call, the others answer it.

They only share a disk. The machine whose process runs the flow writes a call into `<runs>/.calls/`; on every other
machine `python -m weightline.launch.peer RUNS_DIR --machine-rank N` waits for it, starts its own ranks for the call,
and ends them when the call is withdrawn. torchrun connects the ranks.
"""

from __future__ import annotations

import os
import socket
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from weightline.files import write_atomically
from weightline.launch.command import Rendezvous, launch_argv
from weightline.stages.recipe import FrozenModel

#: The folder of all runs, for the processes that a stack or an indexed Job starts.
RUNS_DIR_VARIABLE = "WEIGHTLINE_RUNS_DIR"
#: Address at which the others reach the machine that runs the flow. Default: its host name.
MAIN_ADDRESS_VARIABLE = "WEIGHTLINE_MAIN_ADDRESS"
MAIN_PORT_VARIABLE = "WEIGHTLINE_MAIN_PORT"
#: Machines with the same value belong together: several jobs may share a disk.
GROUP_VARIABLE = "WEIGHTLINE_MACHINES"
_DEFAULT_PORT = 29500

Device = Literal["cpu", "cuda"]


class Call(FrozenModel):
    """One attempt at one stage: everything that a machine needs to run its ranks."""

    call_id: str
    job_path: Path
    num_processes: int
    device: Device
    num_machines: int
    main_address: str
    main_port: int
    environment: dict[str, str]
    """Variables that ranks need in addition to the environment of their own machine."""

    def argv(self, machine_rank: int) -> list[str]:
        """Returns the launch command of one of the machines."""
        rendezvous = Rendezvous(self.num_machines, machine_rank, self.main_address, self.main_port)
        return launch_argv(self.job_path, self.num_processes, self.device, rendezvous)


@contextmanager
def launching(
    job_path: Path,
    runs_dir: Path,
    *,
    num_processes: int,
    device: Device,
    num_machines: int,
    environment: Mapping[str, str],
) -> Iterator[list[str]]:
    """Yields the launch command of this machine. The other machines, if any, are called during the block."""
    if num_machines == 1:
        yield launch_argv(job_path, num_processes, device)
        return
    call = new_call(job_path, num_processes, device, num_machines, environment)
    with calling(runs_dir, call):
        yield call.argv(machine_rank=0)


def new_call(
    job_path: Path, num_processes: int, device: Device, num_machines: int, environment: Mapping[str, str]
) -> Call:
    """Returns a call of this machine. It is not written yet."""
    return Call(
        call_id=uuid.uuid4().hex,
        job_path=job_path.absolute(),
        num_processes=num_processes,
        device=device,
        num_machines=num_machines,
        main_address=os.environ.get(MAIN_ADDRESS_VARIABLE) or socket.getfqdn(),
        main_port=int(os.environ.get(MAIN_PORT_VARIABLE, _DEFAULT_PORT)),
        environment=dict(environment),
    )


@contextmanager
def calling(runs_dir: Path, call: Call) -> Iterator[None]:
    """Writes the call and removes it at the end of the block. A crash leaves it; the job's next call replaces it."""
    folder = calls_dir(runs_dir)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{call.call_id}.json"
    for earlier in folder.glob("*.json"):
        if (left := read_call(earlier)) is None or left.job_path == call.job_path:
            earlier.unlink(missing_ok=True)
    write_atomically(path, call.model_dump_json(indent=1))
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def standing_calls(runs_dir: Path) -> list[Call]:
    """Returns the calls that are not withdrawn, newest first."""
    paths = sorted(calls_dir(runs_dir).glob("*.json"), key=_written_at, reverse=True)
    return [call for path in paths if (call := read_call(path)) is not None]


def read_call(path: Path) -> Call | None:
    """Returns the call in a file, or None when it was withdrawn or the file holds none."""
    try:
        return Call.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None


def calls_dir(runs_dir: Path) -> Path:
    """Returns the folder of this group's calls."""
    return runs_dir / ".calls" / os.environ.get(GROUP_VARIABLE, "all")


def _written_at(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
