"""The tasks of upkeep: each does one verb of the command line to a chain and says what came of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from prefect import get_run_logger, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE

from weightline.chain import Chain, open_chain
from weightline.chain.read.refs import oldest_kept
from weightline.chain.upkeep.compact import plan_compaction, write_compaction
from weightline.chain.upkeep.gc import collect, plan_gc, view_chain
from weightline.chain.upkeep.retention import expire_before
from weightline.chain.upkeep.verify import VerifyReport, verify_chain
from weightline.chain.write.standalone import DEFAULT_CODING
from weightline.deployments.server.artifacts import artifact_key
from weightline.errors import CorruptError
from weightline.lineage.table import escape_markdown_url
from weightline.lineage.text import escape_markdown, format_nbytes

_MAX_TOLD = 20


@dataclass(frozen=True, slots=True)
class UpkeepResult:
    """One verb, and what it did."""

    verb: str
    text: str


@task(task_run_name="verify", cache_policy=NO_CACHE, persist_result=False)
def verify(chain: str, is_deep: bool) -> UpkeepResult:
    """Everything that can be seen to hold, holds; else CorruptError, with what does not. Reads only."""
    report = verify_chain(open_chain(chain), is_deep=is_deep)
    if not report.holds:
        raise CorruptError(f"{chain} does not hold, nothing was changed:\n{told_findings(report)}", chain=chain)
    looked = (
        f"{report.num_versions} versions, {report.num_shortcuts} shortcuts, {report.num_objects} objects: all holds"
    )
    return _told("verify", looked)


@task(task_run_name="compact", cache_policy=NO_CACHE, persist_result=False)
def compact(chain: str) -> UpkeepResult:
    """Write shortcuts to the tip, and an anchor, where readers would otherwise pay more. Safe to repeat."""
    opened = open_chain(chain)
    plan = plan_compaction(opened, coding=DEFAULT_CODING)
    written = write_compaction(opened, plan, coding=DEFAULT_CODING)
    nbytes = format_nbytes(sum(shortcut.payload_nbytes for shortcut in written))
    anchor = ", one of them an anchor" if plan.writes_anchor else ""
    return _told("compact", f"{len(written)} shortcuts to version {plan.tip}{anchor}: {nbytes}")


@task(task_run_name="expire", cache_policy=NO_CACHE, persist_result=False)
def expire(chain: str, keep_versions: int) -> UpkeepResult:
    """Move the horizon so that the newest `keep_versions` stay. Safe to repeat."""
    opened = open_chain(chain)
    before = oldest_kept(opened)
    horizon = expire_before(opened, first_to_keep(opened, keep_versions))
    return _told("expire", f"the oldest kept version is {horizon}, it was {before}")


@task(task_run_name="collect garbage", cache_policy=NO_CACHE, persist_result=False)
def collect_garbage(chain: str, delete: bool, grace_hours: float) -> UpkeepResult:
    """Find what nothing can reach; delete it only if told so. Safe to repeat."""
    opened = open_chain(chain)
    now = datetime.now(UTC)
    plan = plan_gc(view_chain(opened, now), now=now, grace=timedelta(hours=grace_hours))
    if delete:
        collect(opened, plan)
    verb = "deleted" if delete else "would be deleted"
    return _told("collect garbage", f"{len(plan.objects)} objects, {format_nbytes(plan.nbytes)}, {verb}")


@task(task_run_name="show", cache_policy=NO_CACHE, persist_result=False)
def show_maintenance(chain: str, outcomes: Sequence[UpkeepResult]) -> str:
    """Write the artifact `upkeep-<chain>`. Safe to repeat."""
    name = open_chain(chain).name
    key = artifact_key(f"upkeep-{name}")
    create_markdown_artifact(upkeep_markdown(chain, outcomes), key=key, description=f"Upkeep of {name}")
    return key


def upkeep_markdown(chain: str, outcomes: Sequence[UpkeepResult]) -> str:
    """A table, one row a verb. Pure."""
    rows = [f"| {escape_markdown(one.verb)} | {escape_markdown(one.text)} |" for one in outcomes]
    return "\n".join([f"Chain {escape_markdown_url(chain)}", "", "| step | outcome |", "| --- | --- |", *rows, ""])


def told_findings(report: VerifyReport) -> str:
    """The first findings, one a line. Pure."""
    lines = [f"{found.rule}: {found.subject}: {found.message}" for found in report.findings[:_MAX_TOLD]]
    others = len(report.findings) - len(lines)
    return "\n".join([*lines, *([f"and {others} more: weightline verify lists them"] if others else [])])


def first_to_keep(chain: Chain, keep_versions: int) -> int:
    """The oldest of the newest `keep_versions` versions."""
    return max(0, chain.tip().version - keep_versions + 1)


def _told(verb: str, text: str) -> UpkeepResult:
    get_run_logger().info("%s: %s", verb, text)
    return UpkeepResult(verb, text)
