"""What a Prefect server does by itself: it marks a run as crashed that no longer says that it lives."""

from __future__ import annotations

from datetime import timedelta

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture

ZOMBIES = "weightline: mark trainings that no longer live"
#: The tag of the runs that are looked after. Every event of theirs is written to the server's database once more, which
#: SQLite does one at a time: for each short evaluation as well, that made the events of commits late.
WATCHED_TAG = "training"
#: Runs send a heartbeat a minute. Five are missed before a run is taken for dead: a server that was away for a moment
#: has missed some of runs that live.
_SILENT_FOR = timedelta(minutes=5)


def zombie_automation(silent_for: timedelta = _SILENT_FOR) -> AutomationCore:
    """Marks a training as crashed whose last sign of life is this old: its process and its worker are both gone.

    A run that was marked by mistake, since its server was away for longer, goes on; a retry is refused while it does
    (weightline/runs/lock.py), and later finds its stages finished.
    """
    ended = {f"prefect.flow-run.{state}" for state in ("Completed", "Failed", "Cancelled", "Crashed")}
    return AutomationCore(
        name=ZOMBIES,
        description="Worker and process of a run are gone: nobody else would say so. Retry the run to go on with it.",
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
        actions=[ChangeFlowRunState(state=StateType.CRASHED, message="It no longer said that it lives")],
    )


def ensure_automation(client: SyncPrefectClient, automation: AutomationCore) -> None:
    """Make the server have it, once, under its name. Safe to repeat."""
    found = client.read_automations_by_name(automation.name)
    if not found:
        client.create_automation(automation)
        return
    client.update_automation(found[0].id, automation)
    for other in found[1:]:
        client.delete_automation(other.id)
