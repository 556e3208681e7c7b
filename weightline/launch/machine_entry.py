"""What every pod of an indexed Kubernetes Job starts: `python -m weightline.launch.machine_entry COMMAND...`.

Pod 0 becomes the command, which is the flow run; the others lend it their ranks. The Job's success policy ends them
when pod 0 has succeeded, and the Job's failure when it has failed.
"""

from __future__ import annotations

import os
import socket
import sys

from weightline.launch import peer
from weightline.launch.machines import GROUP_VARIABLE, RUNS_DIR_VARIABLE

INDEX_VARIABLE = "JOB_COMPLETION_INDEX"


def main(argv: list[str]) -> None:
    """Returns only on a peer, when it was asked to end."""
    index = int(os.environ.get(INDEX_VARIABLE, "0"))
    # The pods of an indexed Job are called JOB-INDEX.
    os.environ.setdefault(GROUP_VARIABLE, socket.gethostname().removesuffix(f"-{index}"))
    if index == 0:
        os.execvp(argv[0], argv)  # noqa: S606 - it takes this process's place: signals reach it as they are
    peer.main([os.environ.get(RUNS_DIR_VARIABLE, "runs"), "--machine-rank", str(index)])


if __name__ == "__main__":
    main(sys.argv[1:])
