"""Which work queues a local runner serves, and how: one lane a process, one flow run at a time in each. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from weightline.errors import InputError

#: The work pool of deployments/prefect.yaml. A plain worker serves it as well: prefect worker start --pool weightline
WORK_POOL = "weightline"


@dataclass(frozen=True, slots=True)
class Lane:
    """A process that takes flow runs of some work queues, oldest first."""

    name: str
    queues: tuple[str, ...]
    preload: tuple[str, ...] = ()
    """Modules imported before the first run."""
    is_fresh: bool = False
    """Every run gets a process that no run used before; the next one is made ready meanwhile."""


LANES = (
    Lane("training", ("training",), preload=("weightline.flows.post_training",), is_fresh=True),
    Lane("evaluation", ("evaluation",), preload=("weightline.flows.version_eval", "weightline.evaluation.harness")),
    Lane("serving", ("serving",), preload=("weightline.flows.serving_refresh",)),
    Lane("upkeep", ("upkeep",), preload=("weightline.flows.reconcile",)),
)


def lanes_named(names: Sequence[str]) -> tuple[Lane, ...]:
    """The lanes with these names, all of them for none. InputError for a name that no lane has."""
    by_name = {lane.name: lane for lane in LANES}
    for name in names:
        if name not in by_name:
            raise InputError(f"no lane is called {name!r}: use {', '.join(by_name)}", name=name)
    return tuple(by_name[name] for name in names) or LANES


@dataclass(frozen=True, slots=True)
class WaitingRun:
    """A scheduled flow run, as the server offers it."""

    flow_run_id: str
    queue: str
    scheduled_at: float


def choose_runs(idle: Iterable[Lane], waiting: Iterable[WaitingRun]) -> dict[str, WaitingRun]:
    """The run that each idle lane takes next, by lane name: the one that has waited longest in its queues."""
    by_age = sorted(waiting, key=lambda run: (run.scheduled_at, run.flow_run_id))
    return {lane.name: run for lane in idle for run in by_age[::-1] if run.queue in lane.queues}
