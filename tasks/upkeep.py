"""Verifies, compacts, expires and collects garbage, as Prefect tasks. Each does what the command of its name does."""

from __future__ import annotations

from collections.abc import Sequence

from prefect import get_run_logger, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE

from weightline.chain import open_chain
from weightline.chain.read.refs import oldest_kept
from weightline.chain.upkeep.compact import plan_compaction, write_compaction
from weightline.chain.upkeep.gc import collect, find_garbage
from weightline.chain.upkeep.retention import expire_before, first_of_newest
from weightline.chain.upkeep.verify import verify_chain
from weightline.chain.write.standalone import DEFAULT_CODING
from weightline.deployments.server.artifacts import artifact_key
from weightline.errors import CorruptError
from weightline.lineage.pages import UpkeepResult, findings_text, upkeep_markdown
from weightline.lineage.text import format_nbytes


@task(task_run_name="verify", cache_policy=NO_CACHE, persist_result=False)
def verify(chain: str, is_deep: bool) -> UpkeepResult:
    """Checks every invariant that the bucket shows, and changes nothing. Raises CorruptError with the findings."""
    report = verify_chain(open_chain(chain), is_deep=is_deep)
    if not report.holds:
        raise CorruptError(f"{chain} is damaged, and nothing was changed:\n{findings_text(report)}", chain=chain)
    checked = f"{report.num_versions} versions, {report.num_shortcuts} shortcuts, {report.num_objects} objects"
    return _logged("verify", f"{checked}: all holds")


@task(task_run_name="compact", cache_policy=NO_CACHE, persist_result=False)
def compact(chain: str) -> UpkeepResult:
    """Writes shortcuts to the tip, and an anchor, where they save readers bytes. Safe to repeat."""
    opened = open_chain(chain)
    plan = plan_compaction(opened, coding=DEFAULT_CODING)
    written = write_compaction(opened, plan, coding=DEFAULT_CODING)
    nbytes = format_nbytes(sum(shortcut.payload_nbytes for shortcut in written))
    anchor = ", one of them an anchor" if plan.writes_anchor else ""
    return _logged("compact", f"{len(written)} shortcuts to version {plan.tip}{anchor}: {nbytes}")


@task(task_run_name="expire", cache_policy=NO_CACHE, persist_result=False)
def expire(chain: str, keep_versions: int) -> UpkeepResult:
    """Moves the horizon so that the newest `keep_versions` stay. Safe to repeat."""
    opened = open_chain(chain)
    before = oldest_kept(opened)
    horizon = expire_before(opened, first_of_newest(opened, keep_versions))
    return _logged("expire", f"the oldest kept version is {horizon}, it was {before}")


@task(task_run_name="collect garbage", cache_policy=NO_CACHE, persist_result=False)
def collect_garbage(chain: str, delete: bool, grace_hours: float) -> UpkeepResult:
    """Finds unreachable objects, and deletes them if `delete` is true. Safe to repeat."""
    opened = open_chain(chain)
    plan = find_garbage(opened, grace_hours, will_delete=delete)
    if delete:
        collect(opened, plan)
    verb = "deleted" if delete else "would be deleted"
    return _logged("collect garbage", f"{len(plan.objects)} objects, {format_nbytes(plan.nbytes)}, {verb}")


@task(task_run_name="show", cache_policy=NO_CACHE, persist_result=False)
def show_maintenance(chain: str, results: Sequence[UpkeepResult]) -> str:
    """Writes the artifact `upkeep-<chain>`. Safe to repeat."""
    name = open_chain(chain).name
    key = artifact_key(f"upkeep-{name}")
    create_markdown_artifact(upkeep_markdown(chain, results), key=key, description=f"Upkeep of {name}")
    return key


def _logged(verb: str, text: str) -> UpkeepResult:
    get_run_logger().info("%s: %s", verb, text)
    return UpkeepResult(verb, text)
