"""Finds versions whose events or runs were lost, and starts what is missing, as the Prefect tasks of `reconcile`.

The bucket shows which records are missing, and the server which runs are active. An event is sent again under its own
id, so that the server keeps one. A run is started under an idempotency key, so that the server starts one, however many
runs of `reconcile` ask for it at the same time.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.deployments import run_deployment

from weightline.chain import open_chain
from weightline.chain.read.records import EVALUATIONS, REFRESHES, recorded_versions, write_record
from weightline.deployments.server.consumer_runs import (
    CONSUMERS,
    idempotency_keys,
    read_announced,
    read_attempts,
    read_under_way,
)
from weightline.deployments.server.events import announce_commit
from weightline.format.manifest import Header
from weightline.lineage.owed import (
    MAX_ATTEMPTS,
    RETRY_SECONDS,
    ConsumerRun,
    ExhaustedRecord,
    MissingRecord,
    Owed,
    committed_at,
    lacking_versions,
    plan_announcements,
    plan_missing,
    plan_runs,
    read_manifests,
)
from weightline.runs.checks import PATIENCE_SECONDS

#: The server keeps events for seven days. For an older version, runs are started without one.
_ANNOUNCED_DAYS = 6


@task(task_run_name="read active runs", cache_policy=NO_CACHE, persist_result=False)
def find_under_way() -> frozenset[ConsumerRun]:
    """Reads the runs of consumers that wait or are running, for all chains."""
    with get_client(sync_client=True) as client:
        return read_under_way(client, datetime.now(UTC))


@task(task_run_name="find missing records of {chain}", cache_policy=NO_CACHE, persist_result=False)
def find_owed(
    chain: str,
    grace_seconds: float,
    retry_seconds: float = RETRY_SECONDS,
    under_way: frozenset[ConsumerRun] = frozenset(),
) -> Owed:
    """Plans what to start for a chain, from three listings and the manifests of versions that lack a record.

    If a version's event is sent again, no run is started for it now: the event does that. If the event starts nothing,
    the next `reconcile` finds the version again.
    """
    opened = open_chain(chain, patience_seconds=PATIENCE_SECONDS)
    now = datetime.now(UTC)
    before, after = now - timedelta(seconds=grace_seconds), now - timedelta(days=_ANNOUNCED_DAYS)
    evaluated, refreshed = (recorded_versions(opened, kind) for kind in (EVALUATIONS, REFRESHES))
    lacking = lacking_versions(opened.versions(), evaluated, refreshed)
    manifests, unreadable = read_manifests(opened, lacking)
    young = [manifest for manifest in manifests if committed_at(manifest) > after]
    with get_client(sync_client=True) as client:
        announced = read_announced(client, opened.url, young)
        unannounced = plan_announcements(young, announced, before, after)
        announced_now = {manifest.version for manifest in unannounced}
        others = [manifest for manifest in manifests if manifest.version not in announced_now]
        missing = plan_missing(opened.url, others, lacking, before, under_way)
        to_start, exhausted = plan_runs(missing, read_attempts(client, missing, now), now, retry_seconds)
    return Owed(unannounced, to_start, exhausted, unreadable)


@task(task_run_name="announce v{manifest.version} again", cache_policy=NO_CACHE, persist_result=False)
def announce_again(chain: str, manifest: Header) -> None:
    """Sends the version's event again, which starts its consumers. Safe to repeat."""
    announce_commit(chain, manifest)
    get_run_logger().info("announced version %d of %s", manifest.version, chain)


@task(task_run_name="start a run for {missing.kind} v{missing.version}", cache_policy=NO_CACHE, persist_result=False)
def start_missing(missing: MissingRecord) -> None:
    """Starts the consumer's deployment for the version. Safe to repeat: the idempotency key makes it one run."""
    deployment = CONSUMERS[missing.kind]
    run_deployment(
        deployment, parameters={"chain": missing.chain, "version": missing.version, "or_newer": True},
        idempotency_key=idempotency_keys(missing)[missing.num_attempts], timeout=0, as_subflow=False,
    )  # fmt: skip
    get_run_logger().info("started %s for version %d of %s", deployment, missing.version, missing.chain)


@task(task_run_name="give up {exhausted.missing.kind} v{exhausted.missing.version}",
      cache_policy=NO_CACHE, persist_result=False)  # fmt: skip
def give_up(exhausted: ExhaustedRecord) -> None:
    """Writes a record `failed`, after which no further run is started for the record. Safe to repeat.

    If a person starts a run later, the record of that run counts.
    """
    missing = exhausted.missing
    reason = f"{MAX_ATTEMPTS} runs left no record; the last one: {exhausted.last_message}"
    record = {"status": "failed", "reason": reason, "commit_id": missing.commit_id}
    write_record(open_chain(missing.chain), missing.kind, missing.version, "reconcile", record)
    get_run_logger().warning("version %d, %s: %s", missing.version, missing.kind, reason)
