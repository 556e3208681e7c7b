"""Lends this machine's ranks to flows that run elsewhere, as a machine of its own or as a pod of an indexed Job.

python -m weightline.launch.peer RUNS_DIR --machine-rank N     waits for calls and answers them
python -m weightline.launch.peer --indexed-job COMMAND...      in every pod of an indexed Kubernetes Job: pod 0 runs
                                                               the command, which is the flow run; the others wait

The Job's success policy ends the other pods when pod 0 has succeeded, and the Job's failure when it has failed.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
import time
from pathlib import Path

from weightline.errors import MissingExtraError, WeightlineError
from weightline.extras import check_installed
from weightline.launch.command import launch_environment
from weightline.launch.machines import (
    GROUP_VARIABLE,
    RUNS_DIR_VARIABLE,
    Call,
    calls_dir,
    read_call,
    standing_calls,
)
from weightline.stages.job import StageJob

#: The number of a pod in its indexed Job; Kubernetes sets it.
INDEX_VARIABLE = "JOB_COMPLETION_INDEX"
_POLL_SECONDS = 1.0


class _WithdrawnError(Exception):
    """The call of the running ranks was withdrawn."""


def main(argv: list[str]) -> None:
    """Answers calls until SIGTERM or Ctrl-C. In pod 0 of an indexed Job it does not return."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs_dir", type=Path)
    parser.add_argument("--machine-rank", type=int, required=True, help="1 for the first machine beside the flow's own")
    if argv[:1] == ["--indexed-job"]:
        argv = _enter_job(argv[1:])
    args = parser.parse_args(argv)
    try:
        check_installed("train")
    except MissingExtraError as error:
        sys.exit(f"error ({error.kind}): {error}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        _answer_calls(args.runs_dir, args.machine_rank)
    except KeyboardInterrupt:
        return


def _enter_job(command: list[str]) -> list[str]:
    """Replaces this process by the command in pod 0. Returns the arguments of a peer in every other pod."""
    index = int(os.environ.get(INDEX_VARIABLE, "0"))
    # The pods of an indexed Job are called JOB-INDEX.
    os.environ.setdefault(GROUP_VARIABLE, socket.gethostname().removesuffix(f"-{index}"))
    if index == 0:
        os.execvp(command[0], command)  # noqa: S606 - it replaces this process, so that it receives the pod's signals
    return [os.environ.get(RUNS_DIR_VARIABLE, "runs"), "--machine-rank", str(index)]


def _answer_calls(runs_dir: Path, machine_rank: int) -> None:
    answered: set[str] = set()
    while True:
        for call in standing_calls(runs_dir):
            if call.call_id not in answered and machine_rank < call.num_machines:
                answered.add(call.call_id)
                answer(call, runs_dir, machine_rank)
        time.sleep(_POLL_SECONDS)


def answer(call: Call, runs_dir: Path, machine_rank: int) -> None:
    """Runs this machine's ranks to their end, or until the call is withdrawn. Leaves no process.

    A call that this machine cannot answer, such as one whose job it cannot read, is reported on stderr: the flow's
    ranks lack their peers and fail by themselves.
    """
    try:
        _run_own_ranks(call, runs_dir, machine_rank)
    except _WithdrawnError:
        _report("the call was withdrawn: its ranks were ended")
    except (WeightlineError, OSError) as error:
        _report(str(error))


def _run_own_ranks(call: Call, runs_dir: Path, machine_rank: int) -> None:
    job = StageJob.load(call.job_path)
    env = launch_environment(job, {**os.environ, **call.environment})
    log_dir = job.output_dir / f"rank-logs-{machine_rank}"
    path = calls_dir(runs_dir) / f"{call.call_id}.json"

    def tick() -> None:
        if read_call(path) is None:
            raise _WithdrawnError

    # Imported here, since it needs psutil, for which `main` checks first.
    from weightline.launch.ranks import run_ranks, with_rank_logs

    log_path = job.output_dir / f"ranks-{machine_rank}.log"
    run_ranks(with_rank_logs(call.argv(machine_rank), log_dir), env, log_path, _report, tick)


def _report(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
