"""Maintains a chain: verifies it, writes shortcuts, expires old versions and collects garbage."""

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
    """Verify, compact, expire and collect, in this order. If the verification fails, nothing is changed.

    Args:
        chain: URL of the bucket and chain.
        check: `replay every version` reads all payloads and checks every digest; `sizes only` checks manifests and
            object sizes.
        write_shortcuts: Write direct deltas to the newest version where catching up would otherwise cost more.
        keep_versions: Keep this many of the newest versions and expire older ones. Versions that refs or live replicas
            need stay. Empty: keep all.
        delete_garbage: Delete unreachable objects. Off: only report how many there are and their size.
        grace_hours: Keep objects that are younger than this, since a commit under way has objects that no manifest
            names yet.
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
