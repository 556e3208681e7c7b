"""Find versions that were committed while nobody listened, and start what they are owed. Scheduled."""

from __future__ import annotations

from typing import Annotated

from prefect import flow, get_run_logger

from flows.forms import Chains, RunsDir, label
from tasks.reconciling import announce_again, configured_chains, find_owed, start_missing
from tasks.run_folder import default_runs_dir


@flow(name="reconcile", persist_result=False)
def reconcile(
    chains: Chains = [],  # noqa: B006 - never changed; a form shows an empty choice only for this default
    runs_dir: RunsDir = None,
    grace_seconds: Annotated[float, label("Grace (seconds)", ge=0)] = 120.0,
) -> int:
    """Announce versions whose event was lost; start evaluation and refresh of those that no record speaks of.

    Args:
        chains: URLs of chains. Empty: those that the environment variable WEIGHTLINE_CHAINS names, and those of the
            runs folder: of these, an older run has its turn when the newer ones owe nothing.
        runs_dir: Folder of all runs. Empty: that of the stack, or `runs`.
        grace_seconds: Leave versions that are younger than this to their events.
    """
    named, of_runs = (chains, []) if chains else configured_chains(runs_dir or default_runs_dir())
    num_owed = sum(_make_good(chain, grace_seconds) for chain in named)
    for chain in of_runs:
        owed = _make_good(chain, grace_seconds)
        num_owed += owed
        if owed:
            break
    get_run_logger().info("%d chains are looked after, %d things were owed", len(named) + len(of_runs), num_owed)
    return num_owed


def _make_good(chain: str, grace_seconds: float) -> int:
    owed = find_owed(chain, grace_seconds)
    for manifest in owed.unannounced:
        announce_again(chain, manifest)
    for missing in owed.missing:
        start_missing(chain, missing)
    return owed.num_owed
