"""Builds the command line and environment that start one stage under accelerate. Pure: it starts nothing.

The accelerate and DeepSpeed configurations are the files of infra/accelerate, which the package holds beside this
module.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from weightline.errors import InputError
from weightline.stages.job import StageJob
from weightline.stages.preflight import is_local_path

DEEPSPEED_CONFIG = "ds_zero3.json"
RANK_PROGRAM = "weightline.stages.rank"
_CONFIGS = Path(__file__).absolute().with_name("accelerate")


def accelerate_config(name: str) -> Path:
    """Returns the absolute path of a file of infra/accelerate. Raises InputError when the installation lacks it."""
    path = _CONFIGS / name
    if not path.is_file():
        raise InputError(f"no {name} in {_CONFIGS}: install weightline again, from its repository or wheel", name=name)
    return path


@dataclass(frozen=True, slots=True)
class Rendezvous:
    """The address at which several machines meet to train one stage, and the number of this machine."""

    num_machines: int
    machine_rank: int
    main_address: str
    """Address of machine 0 at which the others reach it."""
    main_port: int


def launch_argv(
    job_path: str | Path, num_processes: int, device: str = "cpu", rendezvous: Rendezvous | None = None
) -> list[str]:
    """Returns the `accelerate launch` command of the job's rank program on this machine, with this interpreter.

    Without a rendezvous this machine trains alone and takes a free port. With one, `num_processes` counts the ranks of
    all machines.
    """
    config = accelerate_config("zero3_cpu.yaml" if device == "cpu" else "zero3_gpu.yaml")
    options = {
        "--config_file": str(config),
        "--deepspeed_config_file": str(accelerate_config(DEEPSPEED_CONFIG)),
        "--num_processes": str(num_processes),
        "--main_process_port": "0" if rendezvous is None else str(rendezvous.main_port),
    }
    if rendezvous is not None:
        options |= {
            "--num_machines": str(rendezvous.num_machines),
            "--machine_rank": str(rendezvous.machine_rank),
            "--main_process_ip": rendezvous.main_address,
            # This runs torchrun on every machine. DeepSpeed's own launchers would start the others by ssh.
            "--deepspeed_multinode_launcher": "standard",
        }
    flags = [text for option in options.items() for text in option]
    program = ["-m", RANK_PROGRAM, "--job", str(job_path)]
    return [sys.executable, "-m", "accelerate.commands.launch", *flags, *program]


def launch_environment(job: StageJob, base: Mapping[str, str]) -> dict[str, str]:
    """Returns `base` (usually os.environ) with the variables that ranks need. Values in `base` take precedence."""
    needed = {"TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    if job.device == "cpu":
        needed |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    if job.stage.dataset.is_arithmetic or is_local_path(job.stage.dataset.path):
        needed |= {"HF_HUB_OFFLINE": "1"}
    return needed | dict(base)
