"""The Prefect side of publishing: each rank's four steps as task runs of the stage's flow run, and the commit's event.

Runs inside the rank processes, on their background thread:
`WEIGHTLINE_STEPS=weightline.tasks.sync_steps:prefect_steps`. What Prefect does here touches no network (see
weightline.deployments.ranks.outbox), so a server that is away costs a step nothing. Whatever Prefect does, a step runs
exactly once, and only the step's own error is raised.
"""

from __future__ import annotations

import contextvars
import logging
import os
from collections.abc import Callable
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.states import Completed

from weightline.deployments.ranks.context import MAX_RECORDED_RANKS_VARIABLE, enter_rank_context
from weightline.deployments.server.events import announce_commit
from weightline.lineage.text import format_nbytes, format_percent
from weightline.trainer.steps import Facts, PlainSteps, PublishSteps, StepWork

DEFAULT_MAX_RECORDED_RANKS = 8

logger = logging.getLogger(__name__)


class OnceOnly:
    """A step that runs at most once, and remembers what came of it."""

    def __init__(self, run: Callable[[], Facts]) -> None:
        self._run = run
        self.is_started = False
        self.facts: Facts | None = None
        self.error: BaseException | None = None

    def __call__(self) -> Facts:
        if self.is_started:
            raise RuntimeError("a publish step was about to run twice")
        self.is_started = True
        try:
            self.facts = self._run()
        except BaseException as error:
            self.error = error
            raise
        return self.facts

    def outcome(self) -> Facts:
        """The facts, or the step's own error. Runs the step now when nobody did."""
        if not self.is_started:
            return self()
        if self.error is not None:
            raise self.error
        assert self.facts is not None
        return self.facts


StepTask = Callable[..., Any]


@task(task_run_name="gather partition v{version} r{rank}", cache_policy=NO_CACHE, persist_result=False)
def gather_partition(version: int, rank: int, step: OnceOnly) -> State[Any]:
    """Assemble what changed in this rank's own partition."""
    return _completed(step())


@task(task_run_name="compute delta v{version} r{rank}", cache_policy=NO_CACHE, persist_result=False)
def compute_delta(version: int, rank: int, step: OnceOnly) -> State[Any]:
    """Encode the changes into a payload file."""
    return _completed(step())


@task(task_run_name="upload payload v{version} r{rank}", cache_policy=NO_CACHE, persist_result=False)
def upload_payload(version: int, rank: int, step: OnceOnly) -> State[Any]:
    """Put the payload into the bucket."""
    return _completed(step())


@task(task_run_name="commit v{version}", cache_policy=NO_CACHE, persist_result=False)
def commit_version(version: int, chain: str, step: OnceOnly) -> State[Any]:
    """Write the manifest, then announce the version."""
    facts = step()
    announce_commit(chain, facts)
    return _completed(facts)


class RecordedSteps:
    """PublishSteps that show in the stage's flow run."""

    def __init__(self, context: contextvars.Context, max_recorded_ranks: int) -> None:
        self._context = context
        self._max_recorded_ranks = max_recorded_ranks

    def gather_partition(self, work: StepWork) -> Facts:
        return self._record(gather_partition, work, rank=work.rank)

    def compute_delta(self, work: StepWork) -> Facts:
        return self._record(compute_delta, work, rank=work.rank)

    def upload_payload(self, work: StepWork) -> Facts:
        return self._record(upload_payload, work, rank=work.rank)

    def commit_version(self, work: StepWork) -> Facts:
        return self._record(commit_version, work, chain=work.chain_url)

    def _record(self, step_task: StepTask, work: StepWork, **parameters: Any) -> Facts:
        step = OnceOnly(work.run)
        if is_recorded(work.rank, work.world_size, self._max_recorded_ranks):
            try:
                self._context.run(step_task, version=work.version, step=step, **parameters)
            # Prefect may break in any way and must not break a stage; the step's own error is raised by outcome().
            except Exception as error:  # noqa: BLE001
                if step.error is None:
                    logger.warning("prefect did not record %s v%d: %r", work.name, work.version, error)
        return step.outcome()


def prefect_steps() -> PublishSteps:
    """What WEIGHTLINE_STEPS names. Finds the stage's flow run in the rank's environment; plain steps without one."""
    context = enter_rank_context()
    if context is None:
        return PlainSteps()
    return RecordedSteps(context, int(os.environ.get(MAX_RECORDED_RANKS_VARIABLE, DEFAULT_MAX_RECORDED_RANKS)))


def is_recorded(rank: int, world_size: int, max_recorded_ranks: int) -> bool:
    """Every rank of a small job; rank 0 alone of a large one, so that a thousand ranks do not drown the server."""
    return rank == 0 or world_size <= max_recorded_ranks


def _completed(facts: Facts) -> State[Any]:
    """What the step did, as the message that the UI shows beside the state."""
    return Completed(message=describe(facts))


def describe(facts: Facts) -> str:
    """{"num_changed": 12, "num_elements": 1000, "payload_nbytes": 600} -> "12 changed (1.20 %), 600 B"."""
    parts = []
    if "num_changed" in facts:
        share = facts["num_changed"] / facts["num_elements"] if facts.get("num_elements") else None
        parts.append(f"{facts['num_changed']:,} changed" + ("" if share is None else f" ({format_percent(share)})"))
    if "payload_nbytes" in facts:
        parts.append(format_nbytes(facts["payload_nbytes"]))
    return ", ".join(parts) or "done"
