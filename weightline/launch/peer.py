"""Lends this machine's ranks to flows that run elsewhere.

python -m weightline.launch.peer RUNS_DIR --machine-rank N
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from pathlib import Path

from weightline.errors import WeightlineError
from weightline.launch.command import launch_environment
from weightline.launch.machines import Call, calls_dir, read_call, standing_calls
from weightline.launch.ranks import run_ranks, with_rank_logs
from weightline.stages.job import StageJob

_LOOK_SECONDS = 1.0


class _WithdrawnError(Exception):
    """The call that the ranks work for stands no more."""


def main(argv: list[str]) -> None:
    """Answer calls, one after the other, until SIGTERM or Ctrl-C. A part that failed is told on stderr."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs_dir", type=Path)
    parser.add_argument("--machine-rank", type=int, required=True, help="1 for the first machine beside the flow's own")
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    answered: set[str] = set()
    try:
        while True:
            for call in standing_calls(args.runs_dir):
                if call.call_id not in answered and args.machine_rank < call.num_machines:
                    answered.add(call.call_id)
                    answer(call, args.runs_dir, args.machine_rank)
            time.sleep(_LOOK_SECONDS)
    except KeyboardInterrupt:
        return


def answer(call: Call, runs_dir: Path, machine_rank: int) -> None:
    """Run this machine's ranks to their end, or until the call is withdrawn. No process is left.

    A call that this machine cannot answer, such as one whose job it cannot read, is told on stderr: the flow's ranks
    miss these, and fail by themselves.
    """
    try:
        _take_part(call, runs_dir, machine_rank)
    except _WithdrawnError:
        _tell("the call was withdrawn: its ranks were ended")
    except (WeightlineError, OSError) as error:
        _tell(str(error))


def _take_part(call: Call, runs_dir: Path, machine_rank: int) -> None:
    job = StageJob.load(call.job_path)
    env = launch_environment(job, {**os.environ, **call.environment})
    log_dir = job.output_dir / f"rank-logs-{machine_rank}"
    path = calls_dir(runs_dir) / f"{call.call_id}.json"

    def tick() -> None:
        if read_call(path) is None:
            raise _WithdrawnError

    log_path = job.output_dir / f"ranks-{machine_rank}.log"
    run_ranks(with_rank_logs(call.argv(machine_rank), log_dir), env, log_path, _tell, tick)


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
