"""A process that runs one flow run after another, so that imports are paid once.

Flow run ids come on stdin, one a line; each is answered on stdout by its id when its run has ended, whatever the end.
All that flows print goes to stderr. The parent (weightline.deployments.worker.warm_runner) has claimed the runs, and
marks a run as crashed when this process dies in its middle. SIGTERM during a run ends it as Prefect's engine does, and
then the process.

Of a run's job variables, `env` holds for the run: for the flow, Prefect's settings and child processes. What a library
reads as it is imported may have been read before. The others speak of a process of the run's own, which it has not.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import TextIO
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.context import SettingsContext, SyncClientContext, get_settings_context
from prefect.exceptions import Abort, Pause
from prefect.flow_engine import load_flow, load_flow_run, run_flow
from prefect.logging.loggers import flow_run_logger
from prefect.settings import Settings

from weightline.launch.processes import die_with_parent


def main(argv: list[str]) -> None:
    """`argv`: modules to import before the first run."""
    die_with_parent()
    replies = _take_stdout()
    for module in argv:
        importlib.import_module(module)
    for line in sys.stdin:
        with SyncClientContext.get_or_create():  # one client a run: making one, and its first request, takes a while
            run_one(UUID(line.strip()))
        replies.write(line)
        replies.flush()


def run_one(flow_run_id: UUID) -> None:
    """Run a claimed flow run to its end. Its outcome is its state at the server; nothing is raised for a failed run."""
    os.environ["PREFECT__FLOW_RUN_ID"] = str(flow_run_id)
    flow_run = load_flow_run(flow_run_id)
    logger = flow_run_logger(flow_run)
    try:
        with entered(job_environment(flow_run)):
            run_flow(load_flow(flow_run), flow_run=flow_run, return_type="state")
    except (Abort, Pause) as signal:
        logger.info("Prefect stopped this run: %s", signal)
    # A flow that fails says so at the server, and raises nothing here. One that cannot be loaded, or whose server went
    # away, is left to the parent, which looks at its state.
    except Exception:
        logger.error("The run could not be brought to an end", exc_info=True)


def job_environment(flow_run: FlowRun) -> dict[str, str | None]:
    """What `env` of the job variables changes: the deployment's, then the run's own. None unsets."""
    told = [flow_run.job_variables or {}]
    if flow_run.deployment_id is not None:
        told.insert(0, get_client(sync_client=True).read_deployment(flow_run.deployment_id).job_variables)
    merged = {name: value for variables in told for name, value in (variables.get("env") or {}).items()}
    wanted = {name: None if value is None else str(value) for name, value in merged.items()}
    return {name: value for name, value in wanted.items() if os.environ.get(name) != value}


@contextmanager
def entered(environment: Mapping[str, str | None]) -> Iterator[None]:
    """The environment, and Prefect's settings as it has them, for the length of the block."""
    before = {name: os.environ.get(name) for name in environment}
    _set(environment)
    is_for_prefect = any(name.startswith("PREFECT_") for name in environment)
    try:
        with _settings_of_now() if is_for_prefect else nullcontext():
            yield
    finally:
        _set(before)


def _settings_of_now() -> SettingsContext:
    return SettingsContext(profile=get_settings_context().profile, settings=Settings())


def _set(environment: Mapping[str, str | None]) -> None:
    for name, value in environment.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _take_stdout() -> TextIO:
    """Keep the real stdout for replies; whatever else is printed joins stderr."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return replies


if __name__ == "__main__":
    main(sys.argv[1:])
