"""Starts ranks without a launcher: they are forked from one process that has imported torch, DeepSpeed and TRL.

`accelerate launch` imports these libraries once for the launcher and once a rank: about 20 s of CPU time before a rank
of two does its first step. Here they are imported once for all tests of a pytest process, by a fork server of
multiprocessing that starts with the first rank. What a rank sees is otherwise what accelerate or torchrun gives it:
its environment, a store for the rendezvous that another process holds, and a group that ends when one of it fails.
That the launchers themselves work is shown by tests that start them (tests/stages, tests/launch, tests/flows).
"""

from __future__ import annotations

import atexit
import multiprocessing
import multiprocessing.forkserver
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from multiprocessing.connection import wait as wait_for_any
from pathlib import Path
from typing import TYPE_CHECKING

import huggingface_hub.constants
import pytest

from tests import ROOT
from tests.waiting import PATIENCE_SECONDS
from weightline.launch.command import launch_argv, launch_environment
from weightline.stages.job import StageJob
from weightline.stages.rank import die_with_launcher
from weightline.stages.rank import main as run_stage_program

if TYPE_CHECKING:
    from torch.distributed import TCPStore

_IMPORTS = "tests.ranks_imports"
#: Read when the libraries are imported. No pool of threads may exist when a rank is forked: Arrow's allocator has one.
_IMPORT_ENVIRONMENT = {
    "DS_ACCELERATOR": "cpu",
    "JE_ARROW_MALLOC_CONF": "background_thread:false",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


class RankGroup:
    """Ranks 0 to N-1 of one program, started. They write to one log, and end with this process at the latest."""

    def __init__(
        self,
        main: Callable[..., None],
        args: Sequence[object],
        log_path: Path,
        env: Mapping[str, str] | None = None,
        num_ranks: int = 2,
    ) -> None:
        from torch.distributed import TCPStore

        context = _fork_server()
        self.log_path = log_path
        # Held here, as a launcher holds it: no free port is looked for, and a killed rank does not take it away.
        self._store: TCPStore = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        shared = {**(os.environ if env is None else env), **_rendezvous(num_ranks, self._store.port)}
        self._ranks = [
            context.Process(
                target=_become_rank,
                args=(main, tuple(args), shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, log_path),
            )
            for rank in range(num_ranks)
        ]
        for rank in self._ranks:
            rank.start()

    @property
    def log_tail(self) -> str:
        """The end of what the ranks wrote, as a message for assertions."""
        return self.log_path.read_text(errors="replace")[-4000:] if self.log_path.exists() else ""

    @property
    def is_running(self) -> bool:
        """Whether no rank has ended yet."""
        return all(rank.exitcode is None for rank in self._ranks)

    def kill(self, rank: int) -> None:
        """Kill one rank, as kill -9 does."""
        self._ranks[rank].kill()

    def wait(self) -> list[int | None]:
        """Wait for all ranks to end and return their exit codes. When one fails the others are ended, as torchrun does.

        The test fails when its patience is over before all have ended.
        """
        running = list(self._ranks)
        while running:
            ended = wait_for_any([rank.sentinel for rank in running], timeout=PATIENCE_SECONDS)
            if not ended or any(rank.exitcode for rank in self._ranks):
                for rank in running:
                    rank.terminate()
            assert ended, f"the ranks did not end\n{self.log_tail}"
            running = [rank for rank in running if rank.exitcode is None]
        return [rank.exitcode for rank in self._ranks]


def run_ranks_to_end(
    main: Callable[..., None], args: Sequence[object], log_path: Path, env: Mapping[str, str] | None = None
) -> None:
    """Run a program on two ranks. The test fails, with the end of their log, when a rank fails."""
    group = RankGroup(main, args, log_path, env)
    assert group.wait() == [0, 0], group.log_tail


def start_stage(
    job: StageJob, log_path: Path, main: Callable[[], None] = run_stage_program, num_ranks: int = 2
) -> RankGroup:
    """Start a stage on two ranks under ZeRO-3, with the environment that `accelerate launch` gives them.

    `main` is the rank program; it reads the path of the job file from its command line.
    """
    job_path = log_path.with_suffix(".job.json")
    job.save(job_path)
    argv = ["rank", "--job", str(job_path)]
    return RankGroup(_run_with_argv, (main, argv), log_path, zero3_environment(job), num_ranks)


def run_stage(job: StageJob, log_path: Path, main: Callable[[], None] = run_stage_program, num_ranks: int = 2) -> None:
    """Run a stage on two ranks to its end. The test fails, with the end of their log, when a rank fails."""
    group = start_stage(job, log_path, main, num_ranks)
    assert group.wait() == [0] * num_ranks, group.log_tail


def zero3_environment(job: StageJob | None = None) -> dict[str, str]:
    """Returns the environment of ranks that are launched with ZeRO-3 on the CPU, as accelerate itself makes it."""
    base = dict(os.environ) if job is None else launch_environment(job, os.environ)
    return base | _accelerate_variables()


@cache
def _accelerate_variables() -> dict[str, str]:
    """What `accelerate launch` adds to the environment of ranks: it is asked once, with `env` as the rank program."""
    argv = launch_argv("job.json", num_processes=2)
    program = ["--no_python", "sh", "-c", 'if [ "$RANK" = 0 ]; then env -0; fi']
    done = subprocess.run([*argv[: argv.index("-m", 3)], *program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    variables = dict(line.split("=", 1) for line in done.stdout.split("\0") if "=" in line)
    assert variables["ACCELERATE_USE_DEEPSPEED"] == "true"
    return {name: value for name, value in variables.items() if name.startswith("ACCELERATE_")}


def _rendezvous(num_ranks: int, port: int) -> dict[str, str]:
    """What torchrun tells every rank about the group."""
    return {
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }


@cache
def _fork_server() -> multiprocessing.context.ForkServerContext:
    """Start the process that ranks are forked from. It ends with this one."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([_IMPORTS])
    with pytest.MonkeyPatch.context() as patch:
        for name, value in _IMPORT_ENVIRONMENT.items():
            patch.setenv(name, value)
        patch.chdir(ROOT)
        multiprocessing.forkserver.ensure_running()
    return context


def _become_rank(
    main: Callable[..., None], args: tuple[object, ...], environment: dict[str, str], log_path: Path
) -> None:
    """In the forked process: take on what a launcher would have given it, run, and end as any program."""
    die_with_launcher()
    log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    assert _IMPORTS in sys.modules, "the fork server could not import the libraries"
    assert len(list(Path(f"/proc/{os.getppid()}/task").iterdir())) == 1, (
        "the fork server has threads: its ranks may hang"
    )
    os.environ.clear()
    os.environ.update(environment)
    huggingface_hub.constants.HF_HUB_OFFLINE = environment.get("HF_HUB_OFFLINE") == "1"  # read when it was imported
    multiprocessing.set_start_method("fork", force=True)  # the default of a launched rank
    main(*args)
    atexit._run_exitfuncs()


def _run_with_argv(main: Callable[[], None], argv: list[str]) -> None:
    sys.argv = argv
    main()
