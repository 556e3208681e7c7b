"""A process that runs one flow run after another, so that imports are paid once: `python -m tasks.warm_process`.

Flow run ids come on stdin, one a line; each is answered on stdout by its id when its run has ended, whatever the end.
All that flows print goes to stderr. The parent (flows.warm_runner) has claimed the runs, and marks a run as crashed
when this process dies in its middle. SIGTERM during a run ends it as Prefect's engine does, and then the process.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import TextIO
from uuid import UUID

from prefect.exceptions import Abort, Pause
from prefect.flow_engine import load_flow, load_flow_run, run_flow
from prefect.logging.loggers import flow_run_logger

from tasks.processes import die_with_parent


def main(argv: list[str]) -> None:
    """`argv`: modules to import before the first run."""
    die_with_parent()
    replies = _take_stdout()
    for module in argv:
        importlib.import_module(module)
    for line in sys.stdin:
        run_one(UUID(line.strip()))
        replies.write(line)
        replies.flush()


def run_one(flow_run_id: UUID) -> None:
    """Run a claimed flow run to its end. Its outcome is its state at the server; nothing is raised for a failed run."""
    os.environ["PREFECT__FLOW_RUN_ID"] = str(flow_run_id)
    flow_run = load_flow_run(flow_run_id)
    logger = flow_run_logger(flow_run)
    try:
        run_flow(load_flow(flow_run), flow_run=flow_run, return_type="state")
    except (Abort, Pause) as signal:
        logger.info("Prefect stopped this run: %s", signal)
    # A flow that fails says so at the server, and raises nothing here. One that cannot be loaded, or whose server went
    # away, is left to the parent, which looks at its state.
    except Exception:
        logger.error("The run could not be brought to an end", exc_info=True)


def _take_stdout() -> TextIO:
    """Keep the real stdout for replies; whatever else is printed joins stderr."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return replies


if __name__ == "__main__":
    main(sys.argv[1:])
