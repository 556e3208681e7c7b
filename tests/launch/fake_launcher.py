"""Plays accelerate launch for tests: starts "ranks" in sessions of their own, labels lines, and sums up a failure.

python -m tests.launch.fake_launcher HOW PID_FILE, with HOW one of: succeed, rank-fails, hang, die
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

_ROOT_CAUSE = """\
Traceback (most recent call last):
  File "launch.py", line 1, in <module>
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
============================================================
Root Cause (first observed failure):
[0]:
  time      : 2026-11-24_07:18:37
  host      : localhost
  rank      : 1 (local_rank: 1)
  exitcode  : 3 (pid: 21313)
  error_file: <N/A>
============================================================"""


def main() -> None:
    how, pid_file = sys.argv[1], Path(sys.argv[2])
    ranks = [subprocess.Popen(["sleep", "300"], start_new_session=True) for _ in range(2)]
    pid_file.write_text("\n".join(str(rank.pid) for rank in ranks))
    for step in range(3):
        print(f"[default0]:zero at {step}", flush=True)
        print(f"[default1]:[rank1]: one at {step}", flush=True)
    if how == "hang":
        time.sleep(300)
    if how == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    for rank in ranks:
        rank.kill()
        rank.wait()
    if how == "rank-fails":
        print("[default1]:[rank1]: ValueError: the data are gone", flush=True)
        print("[default0]:[rank0]: RuntimeError: connection reset by peer", flush=True)
        print(_ROOT_CAUSE, flush=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
