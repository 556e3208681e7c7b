"""The command line and environment that start one stage under accelerate. Pure: nothing is started here.

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
class Place:
    """One of several machines that train a stage together."""

    num_machines: int
    machine_rank: int
    main_address: str
    """Of machine 0, as the others reach it."""
    main_port: int


def launch_argv(job_path: str | Path, num_processes: int, device: str = "cpu", place: Place | None = None) -> list[str]:
    """`accelerate launch` of the job's rank program on this machine, with this interpreter.

    Alone, and on a free port; or as one of several machines, `num_processes` counting the ranks of all.
    """
    config = accelerate_config("zero3_cpu.yaml" if device == "cpu" else "zero3_gpu.yaml")
    options = {
        "--config_file": str(config),
        "--deepspeed_config_file": str(accelerate_config(DEEPSPEED_CONFIG)),
        "--num_processes": str(num_processes),
        "--main_process_port": "0" if place is None else str(place.main_port),
    }
    if place is not None:
        options |= {
            "--num_machines": str(place.num_machines),
            "--machine_rank": str(place.machine_rank),
            "--main_process_ip": place.main_address,
            # torchrun on every machine; DeepSpeed's own launchers would go there by ssh.
            "--deepspeed_multinode_launcher": "standard",
        }
    flags = [text for option in options.items() for text in option]
    program = ["-m", RANK_PROGRAM, "--job", str(job_path)]
    return [sys.executable, "-m", "accelerate.commands.launch", *flags, *program]


def launch_environment(job: StageJob, base: Mapping[str, str]) -> dict[str, str]:
    """`base` (usually os.environ) with what the ranks need. The person's own settings of the same names win."""
    wanted = {"TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    if job.device == "cpu":
        wanted |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    if job.stage.dataset.is_arithmetic or is_local_path(job.stage.dataset.path):
        wanted |= {"HF_HUB_OFFLINE": "1"}
    return wanted | dict(base)
