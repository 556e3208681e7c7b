"""What was committed and then forgotten: versions that no record says were evaluated or offered to serving."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.deployments import run_deployment

from tasks.run_folder import open_run, runs_dir_of
from weightline.chain import open_chain
from weightline.chain.records import EVALUATIONS, REFRESHES, Record, read_records
from weightline.errors import WeightlineError
from weightline.format.manifest import Manifest

EVALUATE = "evaluate-version/evaluate-version"
REFRESH = "refresh-serving/refresh-serving"
#: A run that was started for a version and crashed is started again in the next window, and not before.
WINDOW_SECONDS = 300
MAX_STARTED = 50


@dataclass(frozen=True, slots=True)
class Missing:
    """A version that a consumer owes a record."""

    version: int
    commit_id: str
    deployment: str

    def idempotency_key(self, now_seconds: float) -> str:
        """The same within a window, however many reconcile at once: the server starts one run for it."""
        return f"{self.deployment}:{self.commit_id}:{int(now_seconds // WINDOW_SECONDS)}"


def plan_reconcile(
    manifests: Sequence[Manifest],
    evaluations: Iterable[Record],
    refreshes: Iterable[Record],
    committed_before: datetime,
    max_started: int = MAX_STARTED,
) -> tuple[Missing, ...]:
    """What to start, oldest first, at most `max_started`. Younger versions are left to their events. Pure."""
    evaluated, refreshed = ({record["version"] for record in records} for records in (evaluations, refreshes))
    missing = [
        Missing(manifest.version, manifest.commit_id, deployment)
        for manifest in manifests
        if datetime.fromisoformat(manifest.created_at) < committed_before
        for deployment, recorded in ((EVALUATE, evaluated), (REFRESH, refreshed))
        if manifest.version not in recorded
    ]
    return tuple(missing[:max_started])


@task(task_run_name="look for what {chain} owes", cache_policy=NO_CACHE, persist_result=False)
def find_missing(chain: str, grace_seconds: float) -> tuple[Missing, ...]:
    """Read the bucket and plan. Reads only."""
    opened = open_chain(chain)
    committed_before = datetime.now(UTC) - timedelta(seconds=grace_seconds)
    evaluations, refreshes = (read_records(opened, kind) for kind in (EVALUATIONS, REFRESHES))
    return plan_reconcile(opened.manifests(), evaluations, refreshes, committed_before)


@task(task_run_name="start {missing.deployment} v{missing.version}", cache_policy=NO_CACHE, persist_result=False)
def start_missing(chain: str, missing: Missing) -> None:
    """Start the consumer's deployment for the version. Safe to repeat: the same run within a window."""
    parameters = {"chain": chain, "version": missing.version}
    key = missing.idempotency_key(time.time())
    run_deployment(missing.deployment, parameters=parameters, idempotency_key=key, timeout=0, as_subflow=False)
    get_run_logger().info("started %s for version %d of %s", missing.deployment, missing.version, chain)


def newest_chain(runs_dir: str | Path) -> str | None:
    """The chain of the run that was started last, or None. Folders that are no runs are passed over."""
    runs = sorted(runs_dir_of(runs_dir).glob("*/run.json"), key=lambda path: path.stat().st_mtime)
    for path in reversed(runs):
        try:
            return open_run(path.parent).chain_url
        except WeightlineError:
            continue
    return None
