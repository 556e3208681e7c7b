"""Shows the four publish steps of each rank as task runs of the stage's flow run, and emits the commit's event.

The trainer does the work; a task waits for the end of a step and reports what it did. The tasks run on a thread of
their own in each rank (weightline.deployments.ranks.recorder), which makes no network requests: events go to the outbox
(weightline.deployments.ranks.outbox). So training never waits for Prefect, with or without a server.
"""

from __future__ import annotations

from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.states import Completed

from weightline.deployments.ranks.context import is_under_a_flow_run, max_recorded_ranks, rank_context
from weightline.deployments.ranks.recorder import StepRecorder
from weightline.deployments.server.events import announce_commit
from weightline.lineage.text import format_nbytes, format_percent
from weightline.trainer.steps import NoObserver, Step, StepFacts, StepObserver


@task(task_run_name="gather partition v{version} r{rank}", cache_policy=NO_CACHE, persist_result=False)
def gather_partition(version: int, rank: int, step: Step) -> State[Any]:
    """Sum up the changes in this rank's own partition."""
    return _completed(step.wait())


@task(task_run_name="compute delta v{version} r{rank}", cache_policy=NO_CACHE, persist_result=False)
def compute_delta(version: int, rank: int, step: Step) -> State[Any]:
    """Encode the changes into a payload file."""
    return _completed(step.wait())


@task(task_run_name="upload payload v{version} r{rank}", cache_policy=NO_CACHE, persist_result=False)
def upload_payload(version: int, rank: int, step: Step) -> State[Any]:
    """Put the payload into the bucket."""
    return _completed(step.wait())


@task(task_run_name="commit v{version}", cache_policy=NO_CACHE, persist_result=False)
def commit_version(version: int, rank: int, step: Step) -> State[Any]:
    """Write the manifest, then announce the version."""
    facts = step.wait()
    if facts.manifest is not None:
        announce_commit(step.chain_url, facts.manifest)
    return _completed(facts)


_TASKS = {
    "gather_partition": gather_partition,
    "compute_delta": compute_delta,
    "upload_payload": upload_payload,
    "commit_version": commit_version,
}


def record_step(step: Step) -> None:
    """Runs the task of a step that begins. Returns when the step and the task have ended."""
    _TASKS[step.name](version=step.version, rank=step.rank, step=step)


def prefect_observer() -> StepObserver:
    """Returns the observer that records steps in the flow run that the rank's environment names.

    Without such a flow run, or without a server's URL, the observer does nothing.
    """
    if not is_under_a_flow_run():
        return NoObserver()
    return StepRecorder(rank_context, record_step, max_recorded_ranks())


def _completed(facts: StepFacts) -> State[Any]:
    """Returns a completed state with the message that the UI shows beside it."""
    return Completed(message=describe(facts))


def describe(facts: StepFacts) -> str:
    """Returns what a step did in words, such as "12 changed (1.20 %), 600 B"."""
    parts = []
    if facts.num_changed is not None:
        share = f" ({format_percent(facts.num_changed / facts.num_elements)})" if facts.num_elements else ""
        parts.append(f"{facts.num_changed:,} changed{share}")
    if facts.payload_nbytes is not None:
        parts.append(format_nbytes(facts.payload_nbytes))
    return ", ".join(parts) or "done"
