"""Measures the time from a commit to the start of its evaluation and its refresh, on PostgreSQL and on SQLite.

    python -m benchmarks.trigger_bench --num 20                                  # both databases, 20 versions each
    python -m benchmarks.trigger_bench --num 500 --every 1 --database postgres   # commits as fast training does

With `--every` it does not wait for the runs of a version before it commits the next one, as training with a version a
step does not. It then waits until every version was evaluated and served, or a newer one instead, and counts the runs
that did not complete.

It starts a local stack like `weightline up` in a temporary folder, and commits and announces versions of the built-in
model as a rank does. The times of the runs are the server's. It also counts the lines about locks in the logs of server
and database. The machine should be idle: its load is printed with the result.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from weightline.chain import Chain, open_chain
from weightline.chain.files.assets import assets_of
from weightline.chain.files.source import FolderSource
from weightline.chain.read.records import EVALUATIONS, REFRESHES, recorded_versions, write_record
from weightline.chain.write.draft import Authorship
from weightline.chain.write.standalone import DEFAULT_CODING, commit_folder, commit_source
from weightline.deployments.stack.database import CONNECTION_VARIABLE
from weightline.deployments.stack.up_and_down import stack_of
from weightline.format.manifest import Manifest
from weightline.lineage.read import read_lineage

CONSUMERS = ("evaluate-version", "refresh-serving")
_RECIPE: dict[str, Any] = {
    "name": "trigger",
    "model": {"tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16}},
    "stages": [{"kind": "sft", "max_steps": 1, "learning_rate": 1e-3}],
    "evaluation": {"limit": 8},
}
_SETTLE_SECONDS = 300.0
DATABASES = ("postgres", "sqlite")
_LOCK_WORDS = ("database is locked", "deadlock detected", "lock timeout", "could not serialize")


@dataclass(frozen=True, slots=True)
class Start:
    """The seconds from the commit until the run was created, was claimed, and was running."""

    created: float
    claimed: float
    running: float


def main() -> None:
    """Prints the distributions for each database."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num", type=int, default=20, help="versions to measure")
    parser.add_argument("--pause", type=float, default=1.0, help="seconds between two versions, after their runs ended")
    parser.add_argument("--every", type=float, help="commit a version so many seconds after the one before")
    parser.add_argument("--database", choices=DATABASES, help="one of them; both by default")
    args = parser.parse_args()
    if args.database is not None:
        measure_database(args.database, args.num, args.pause, args.every)
        return
    for database in DATABASES:  # each in a process of its own: Prefect reads its settings once
        argv = [sys.executable, "-m", "benchmarks.trigger_bench", "--database", database]
        argv += [] if args.every is None else ["--every", str(args.every)]
        subprocess.run([*argv, "--num", str(args.num), "--pause", str(args.pause)], check=True)


def measure_database(database: str, num_versions: int, pause_seconds: float, every_seconds: float | None) -> None:
    """Measures a stack on one database, and prints what was found."""
    console = Console(width=120, highlight=False)
    with tempfile.TemporaryDirectory(prefix="weightline-bench-") as name:
        folder = Path(name)
        os.environ.pop(CONNECTION_VARIABLE, None)
        if database == "sqlite":
            os.environ[CONNECTION_VARIABLE] = f"sqlite+aiosqlite:///{folder}/prefect.db"
        began_at = time.monotonic()
        with stack_of(folder / "runs", console, 0) as stack:
            up_seconds = time.monotonic() - began_at
            if database == "postgres" and stack.sqlite_reason is not None:
                raise SystemExit(f"no PostgreSQL here: {stack.sqlite_reason}")
            load = os.getloadavg()
            chain, model = _prepared(folder), folder / "model"
            starts, stream = {}, None
            if every_seconds is None:
                starts = _measure(chain, model, num_versions, pause_seconds)
            else:
                stream = _stream(chain, model, num_versions, every_seconds)
            num_locks = sum(_num_locks(path) for path in stack.folder.log_dir.glob("*.log"))
    loads = ", ".join(f"{one:.2f}" for one in load)
    console.print(f"{database}: up and deployed in {up_seconds:.1f} s; load {loads} on {os.cpu_count()} cores")
    console.print(f"  lines of the logs that speak of locks: {num_locks}")
    if stream is not None:
        console.print(stream)
    _print(console, starts)


def _num_locks(log: Path) -> int:
    return sum(any(word in line for word in _LOCK_WORDS) for line in log.read_text(errors="replace").splitlines())


def _prepared(folder: Path) -> Chain:
    """Makes the model, and a chain that has a recipe and no version yet."""
    from weightline.runs.recipes import RUNS
    from weightline.stages.model import materialize_model
    from weightline.stages.recipe import Recipe

    recipe = Recipe.model_validate(_RECIPE)
    materialize_model(recipe.model, folder / "model", seed=0)
    chain = open_chain((folder / "bucket" / "trigger").as_uri())
    write_record(chain, RUNS, 0, "cli", {"status": "done", "recipe": recipe.model_dump(mode="json")})
    return chain


def _measure(chain: Chain, model: Path, num_versions: int, pause_seconds: float) -> dict[str, list[Start]]:
    from prefect.client.orchestration import get_client

    from weightline.deployments.prefect_private import send_events_to
    from weightline.deployments.ranks.outbox import EventOutbox
    from weightline.deployments.server.events import announce_commit

    send_events_to(EventOutbox(os.environ["PREFECT_API_URL"]))
    starts: dict[str, list[Start]] = {name: [] for name in CONSUMERS}
    with get_client(sync_client=True) as client:
        for number in range(num_versions + 2):  # the first two warm everything up
            _nudge(model / "model.safetensors", number)
            manifest = commit_folder(chain, model)
            committed_at = time.time()
            announce_commit(chain.url, manifest)
            for name in CONSUMERS:
                start = _wait_for_end(client, name, chain.url, manifest.version, committed_at)
                if number >= 2:
                    starts[name].append(start)
            time.sleep(pause_seconds)
    return starts


def _stream(chain: Chain, model: Path, num_versions: int, every_seconds: float) -> str:
    """Commits at a fixed rate, waits until all versions are settled, and returns what became of them."""
    from weightline.deployments.prefect_private import send_events_to
    from weightline.deployments.ranks.outbox import EventOutbox
    from weightline.deployments.server.events import announce_commit

    send_events_to(EventOutbox(os.environ["PREFECT_API_URL"]))
    began_at = time.monotonic()
    for number in range(num_versions):
        time.sleep(max(0.0, began_at + number * every_seconds - time.monotonic()))
        _nudge(model / "model.safetensors", number)
        announce_commit(chain.url, _commit_step(chain, model, number))
    committed_seconds = time.monotonic() - began_at
    _wait_until_settled(chain, num_versions)
    settled_seconds = time.monotonic() - began_at
    rows = read_lineage(chain)
    evaluated, served = (sum(getattr(row, name) == "done" for row in rows) for name in ("evaluation", "serving"))
    return (
        f"  {num_versions} versions committed in {committed_seconds:.0f} s, settled after {settled_seconds:.0f} s: "
        f"{evaluated} evaluated and {served} served, a newer one instead of the others; runs by their end: {_ends()}"
    )


def _commit_step(chain: Chain, model: Path, number: int) -> Manifest:
    """Commits a version as training does: one in fifty is a milestone, which is always evaluated."""
    if number == 0:
        return commit_folder(chain, model)
    author = Authorship(
        stage="sft", run_id="cli", global_step=number, kind="delta", coding=DEFAULT_CODING,
        is_milestone=number % 50 == 0, assets=assets_of(chain, number - 1),
    )  # fmt: skip
    return commit_source(chain, FolderSource(model), author)


def _wait_until_settled(chain: Chain, num_versions: int) -> None:
    num_settled, deadline = 0, time.monotonic() + _SETTLE_SECONDS
    while num_settled < num_versions:
        time.sleep(2)
        found = len(recorded_versions(chain, EVALUATIONS) & recorded_versions(chain, REFRESHES))
        if found > num_settled:
            num_settled, deadline = found, time.monotonic() + _SETTLE_SECONDS
        if time.monotonic() > deadline:
            raise SystemExit(f"only {num_settled} of {num_versions} versions are evaluated and served")


def _ends() -> dict[str, int]:
    """Returns how many flow runs ended in each state."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterState, FlowRunFilterStateType
    from prefect.client.schemas.objects import StateType

    with get_client(sync_client=True) as client:
        return {
            state.value: count
            for state in StateType
            if (
                count := client.count_flow_runs(
                    flow_run_filter=FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[state])))
                )
            )
        }


def _wait_for_end(client: Any, deployment: str, chain: str, version: int, committed_at: float) -> Start:
    from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterName
    from prefect.client.schemas.sorting import FlowRunSort

    named = DeploymentFilter(name=DeploymentFilterName(any_=[deployment]))
    deadline = time.monotonic() + _SETTLE_SECONDS
    while time.monotonic() < deadline:
        time.sleep(0.5)
        latest = client.read_flow_runs(deployment_filter=named, sort=FlowRunSort.EXPECTED_START_TIME_DESC, limit=20)
        for run in latest:
            is_asked = (run.parameters.get("chain"), run.parameters.get("version")) == (chain, version)
            if is_asked and run.state and run.state.is_final():
                latest_first = sorted(
                    client.read_flow_run_states(run.id), key=lambda state: state.timestamp, reverse=True
                )
                first_of = {state.type.value: state.timestamp.timestamp() for state in latest_first}
                times = (run.created.timestamp(), first_of["PENDING"], first_of["RUNNING"])
                return Start(*(moment - committed_at for moment in times))
    raise SystemExit(f"{deployment} of version {version} did not end in {_SETTLE_SECONDS:.0f} s")


def _nudge(weights: Path, seed: int) -> None:
    """Moves a few of the model's bf16 weights by one unit in the last place."""
    raw = bytearray(weights.read_bytes())
    first = 8 + int.from_bytes(raw[:8], "little")
    for at in np.random.default_rng(seed).choice((len(raw) - first) // 2, 50, replace=False):
        raw[first + 2 * int(at)] ^= 1
    weights.write_bytes(raw)


def _print(console: Console, starts: dict[str, list[Start]]) -> None:
    for name, found in starts.items():
        console.print(f"  {name}, {len(found)} versions, seconds from the commit:")
        for part in ("created", "claimed", "running"):
            values = sorted(getattr(start, part) for start in found)
            tenth = values[min(len(values) - 1, int(0.9 * len(values)))]
            console.print(
                f"    {part:8} median {statistics.median(values):.2f}, 90 % {tenth:.2f}, "
                f"from {values[0]:.2f} to {values[-1]:.2f}, {sum(value > 5.0 for value in values)} over 5 s"
            )


if __name__ == "__main__":
    main()
