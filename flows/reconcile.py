"""Finds versions whose events or runs were lost, and starts the evaluations and refreshes that are missing."""

from __future__ import annotations

from typing import Annotated

from prefect import flow, get_run_logger

from weightline.errors import WeightlineError
from weightline.flows.forms import Chains, RunsDir, label
from weightline.lineage.owed import Owed, take_turns
from weightline.runs.checks import check_runs_dir
from weightline.runs.folder import configured_chains, default_runs_dir
from weightline.tasks.reconcile import announce_again, find_owed, find_under_way, give_up, start_missing


@flow(name="reconcile", persist_result=False)
def reconcile(
    chains: Chains = [],  # noqa: B006 - never changed; a form shows an empty choice only for this default
    runs_dir: RunsDir = None,
    grace_seconds: Annotated[float, label("Grace (seconds)", ge=0)] = 120.0,
    retry_seconds: Annotated[float, label("Pause before a retry (seconds)", ge=0)] = 300.0,
) -> int:
    """Announce versions whose event was lost, and start an evaluation or refresh where its record is missing.

    Args:
        chains: URLs of chains. Empty: those that the environment variable WEIGHTLINE_CHAINS names, and those of the
            runs folder. If a chain cannot be read, the run fails after it has handled the others.
        runs_dir: Folder of all runs. Empty: that of the stack, or `runs`.
        grace_seconds: Leave versions that are younger than this to their events.
        retry_seconds: Pause before the next run when a run left no record. It doubles with every run; at most six
            runs are started.
    """
    if runs_dir is not None:
        check_runs_dir(runs_dir)
    named = chains or configured_chains(runs_dir or default_runs_dir())
    under_way = find_under_way()
    found: list[Owed] = []
    problems: dict[str, Exception] = {}
    for chain in named:
        try:
            owed = find_owed(chain, grace_seconds, retry_seconds, under_way)
            for manifest in owed.unannounced:
                announce_again(chain, manifest)
            for exhausted in owed.exhausted:
                give_up(exhausted)
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
    get_run_logger().info("%d chains were checked, %d events and runs were owed", len(named), num_owed)
    if problems:
        listed = "; ".join(f"{chain}: {error}" for chain, error in problems.items())
        raise ExceptionGroup(f"chains: some could not be checked: {listed}", list(problems.values()))
    return num_owed
