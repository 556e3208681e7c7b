"""Defines the automation of the Prefect server that marks a training as crashed when its heartbeats stop."""

from __future__ import annotations

from datetime import timedelta

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture

ZOMBIES = "weightline: mark trainings that no longer live"
#: The tag of the runs that the automation watches. The server writes each event of a watched run to its database twice,
#: and SQLite allows one write at a time. Watching short evaluations as well delayed the events of commits.
WATCHED_TAG = "training"
#: Runs send a heartbeat every minute. Five may be missing, since an unavailable server misses heartbeats of live runs.
_SILENT_FOR = timedelta(minutes=5)


def zombie_automation(silent_for: timedelta = _SILENT_FOR) -> AutomationCore:
    """Returns the automation that marks a training Crashed when no heartbeat arrived for `silent_for`.

    Heartbeats stop when the run's process and its worker have both died, and then nothing else reports the end. A run
    that is marked by mistake, because the server was unavailable for longer, continues. Until it ends, a retry is
    refused (weightline/runs/lock.py); after that, a retry finds its stages finished.
    """
    ended = {f"prefect.flow-run.{state}" for state in ("Completed", "Failed", "Cancelled", "Crashed")}
    return AutomationCore(
        name=ZOMBIES,
        description="Its heartbeats stopped: worker and process of the run are gone. Retry the run to continue it.",
        trigger=EventTrigger(
            after={"prefect.flow-run.heartbeat"},
            expect={"prefect.flow-run.heartbeat", *ended},
            match={"prefect.resource.id": ["prefect.flow-run.*"]},
            match_related={"prefect.resource.id": [f"prefect.tag.{WATCHED_TAG}"], "prefect.resource.role": ["tag"]},
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=silent_for,
        ),
        actions=[ChangeFlowRunState(state=StateType.CRASHED, message="Its heartbeats stopped")],
    )


def ensure_automation(client: SyncPrefectClient, automation: AutomationCore) -> None:
    """Creates or updates the automation of this name, and deletes duplicates of the name. Safe to repeat."""
    found = client.read_automations_by_name(automation.name)
    if not found:
        client.create_automation(automation)
        return
    client.update_automation(found[0].id, automation)
    for other in found[1:]:
        client.delete_automation(other.id)
