"""From a commit to the start of its evaluation and its refresh: `python -m benchmarks.trigger_bench [--num 20]`.

A local stack as `make up` starts it, in a folder that goes afterwards, and a chain of the built-in model. Each version
is committed and announced as a rank does it; the server's own times tell when its consumers began. The machine should
be quiet: the load is printed with the result.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from weightline.chain import Chain, open_chain
from weightline.chain.read.records import write_record
from weightline.chain.write.standalone import commit_folder
from weightline.deployments.stack.pipeline import stack_of

CONSUMERS = ("evaluate-version", "refresh-serving")
_RECIPE: dict[str, Any] = {
    "name": "trigger",
    "model": {"tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16}},
    "stages": [{"kind": "sft", "max_steps": 1, "learning_rate": 1e-3}],
    "evaluation": {"limit": 8},
}
_SETTLE_SECONDS = 120.0


@dataclass(frozen=True, slots=True)
class Start:
    """Seconds from the commit until the run was there, was claimed, and went."""

    created: float
    claimed: float
    running: float


def main() -> None:
    """Print the distribution, by consumer and by part of the way."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num", type=int, default=20, help="versions to measure")
    parser.add_argument("--pause", type=float, default=1.0, help="seconds between two versions, after their runs ended")
    args = parser.parse_args()
    console = Console(width=120)
    with tempfile.TemporaryDirectory(prefix="weightline-bench-") as name:
        folder = Path(name)
        with stack_of(folder / "runs", console, 0):
            load = os.getloadavg()
            starts = _measure(_prepared(folder), folder / "model", args.num, args.pause)
    _print(console, starts, load)


def _prepared(folder: Path) -> Chain:
    """A chain with one version that has been evaluated and served: what follows finds everything warm."""
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


def _wait_for_end(client: Any, deployment: str, chain: str, version: int, committed_at: float) -> Start:
    from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterName

    named = DeploymentFilter(name=DeploymentFilterName(any_=[deployment]))
    deadline = time.monotonic() + _SETTLE_SECONDS
    while time.monotonic() < deadline:
        time.sleep(0.5)
        for run in client.read_flow_runs(deployment_filter=named, limit=20):
            if run.parameters == {"chain": chain, "version": version} and run.state and run.state.is_final():
                states = {
                    state.type.value: state.timestamp.timestamp() for state in client.read_flow_run_states(run.id)
                }
                times = (run.created.timestamp(), states["PENDING"], states["RUNNING"])
                return Start(*(moment - committed_at for moment in times))
    raise SystemExit(f"{deployment} of version {version} did not end in {_SETTLE_SECONDS:.0f} s")


def _nudge(weights: Path, seed: int) -> None:
    """Move a few of the model's bf16 weights by one unit in the last place."""
    raw = bytearray(weights.read_bytes())
    first = 8 + int.from_bytes(raw[:8], "little")
    for at in np.random.default_rng(seed).choice((len(raw) - first) // 2, 50, replace=False):
        raw[first + 2 * int(at)] ^= 1
    weights.write_bytes(raw)


def _print(console: Console, starts: dict[str, list[Start]], load: tuple[float, float, float]) -> None:
    console.print(f"load before: {', '.join(f'{one:.2f}' for one in load)}; {os.cpu_count()} cores", highlight=False)
    for name, found in starts.items():
        console.print(f"{name}, {len(found)} versions, seconds from the commit:", highlight=False)
        for part in ("created", "claimed", "running"):
            values = sorted(getattr(start, part) for start in found)
            tenth = values[min(len(values) - 1, int(0.9 * len(values)))]
            console.print(
                f"  {part:8} median {statistics.median(values):.2f}, 90 % {tenth:.2f}, "
                f"from {values[0]:.2f} to {values[-1]:.2f}",
                highlight=False,
            )


if __name__ == "__main__":
    main()
