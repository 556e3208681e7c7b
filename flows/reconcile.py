"""Find versions that were committed while nobody listened, and start what they are owed. Scheduled."""

from __future__ import annotations

from typing import Annotated

from prefect import flow, get_run_logger

from weightline.errors import WeightlineError
from weightline.flows.forms import Chains, RunsDir, label
from weightline.runs.checks import check_runs_dir
from weightline.runs.folder import default_runs_dir
from weightline.tasks.reconcile import (
    Owed,
    announce_again,
    configured_chains,
    find_owed,
    find_under_way,
    give_up,
    start_missing,
    take_turns,
)


@flow(name="reconcile", persist_result=False)
def reconcile(
    chains: Chains = [],  # noqa: B006 - never changed; a form shows an empty choice only for this default
    runs_dir: RunsDir = None,
    grace_seconds: Annotated[float, label("Grace (seconds)", ge=0)] = 120.0,
) -> int:
    """Announce versions whose event was lost; start evaluation and refresh of those that no record speaks of.

    Args:
        chains: URLs of chains. Empty: those that the environment variable WEIGHTLINE_CHAINS names, and those of the
            runs folder. A chain that cannot be read fails the run when the others have got what they are owed.
        runs_dir: Folder of all runs. Empty: that of the stack, or `runs`.
        grace_seconds: Leave versions that are younger than this to their events.
    """
    if runs_dir is not None:
        check_runs_dir(runs_dir)
    wanted = chains or configured_chains(runs_dir or default_runs_dir())
    under_way = find_under_way()
    found: list[Owed] = []
    problems: dict[str, Exception] = {}
    for chain in wanted:
        try:
            owed = find_owed(chain, grace_seconds, under_way)
            _tell(chain, owed)
        except (WeightlineError, ValueError, OSError) as error:
            problems[chain] = error
            continue
        found.append(owed)
        if owed.unreadable:
            problems[chain] = owed.unreadable[0]
    started = take_turns([owed.to_start for owed in found], under_way)
    for missing in started:
        start_missing(missing)
    num_owed = len(started) + sum(len(owed.unannounced) for owed in found)
    get_run_logger().info("%d chains are looked after, %d things were owed", len(wanted), num_owed)
    if problems:
        told = "; ".join(f"{chain}: {error}" for chain, error in problems.items())
        raise ExceptionGroup(f"chains: not all could be looked after: {told}", list(problems.values()))
    return num_owed


def _tell(chain: str, owed: Owed) -> None:
    """Announce what the server has not heard of, and write down what no run brought about."""
    for manifest in owed.unannounced:
        announce_again(chain, manifest)
    for missing, why in owed.exhausted:
        give_up(missing, why)
