"""Keeps a chain in shape: checks it, shortens the ways into it, expires old history. Scheduled or by hand."""

from __future__ import annotations

from typing import Annotated, Literal

from prefect import flow
from prefect.runtime import flow_run

from weightline.chain.read.history import chain_name
from weightline.flows.forms import ChainUrl, label
from weightline.lineage.pages import UpkeepResult
from weightline.runs.checks import PATIENCE_SECONDS, check_chain
from weightline.tasks.upkeep import collect_garbage, compact, expire, show_maintenance, verify


def _name_run() -> str:
    return f"maintain {chain_name(flow_run.parameters['chain'])}"


@flow(name="maintain-chain", flow_run_name=_name_run, persist_result=False)
def maintain_chain(
    chain: ChainUrl,
    check: Annotated[Literal["replay every version", "sizes only"], label("Check")] = "replay every version",
    write_shortcuts: Annotated[bool, label("Write shortcuts")] = True,
    keep_versions: Annotated[int | None, label("Versions to keep", ge=1)] = None,
    delete_garbage: Annotated[bool, label("Delete garbage")] = False,
    grace_hours: Annotated[float, label("Grace (hours)", ge=1)] = 24.0,
) -> list[UpkeepResult]:
    """Verify, compact, expire and collect, in this order. A chain that does not hold is left as it is.

    Args:
        chain: URL of the bucket and chain.
        check: `replay every version` reads all payloads and proves every digest; `sizes only` looks at manifests and
            object sizes.
        write_shortcuts: Write direct deltas to the newest version where catching up would otherwise cost more.
        keep_versions: Expire history older than the newest so many versions. What refs and live replicas need stays.
            Empty: keep all.
        delete_garbage: Delete the objects that nothing can reach. Off: only say which would be deleted.
        grace_hours: Leave objects alone that are younger than this: a commit under way has some that nothing names yet.
    """
    check_chain(chain, PATIENCE_SECONDS)
    results = [verify(chain, is_deep=check == "replay every version")]
    if write_shortcuts:
        results.append(compact(chain))
    if keep_versions is not None:
        results.append(expire(chain, keep_versions))
    results.append(collect_garbage(chain, delete_garbage, grace_hours))
    show_maintenance(chain, results)
    return results
