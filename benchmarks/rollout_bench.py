"""Measures what lookahead saves where completions take seconds: GRPO with and without it, in one run.

    python -m benchmarks.rollout_bench [--delay 4] [--steps 10]

It trains the built-in model, from random weights, with the GRPO stage of the recipe that ships with weightline, on two
ranks under ZeRO-3. An embedded replica in a process of its own follows the chain. Its lease names a proxy in this
process, which holds back each answer with completions for `--delay` seconds and passes everything else at once: a
replica that takes long. The first training is synchronous (lookahead 0, staleness 0), the second one has lookahead 1
and staleness 2. The time of a training is that from its first version to its last one, by their manifests.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from rich.console import Console
from rich.table import Table
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from weightline.format.manifest import parse_time
from weightline.runs.folder import Run
from weightline.runs.prepare import prepare_run
from weightline.runs.progress import MetricsFollower
from weightline.runs.stage import run_stage
from weightline.serving.http.auth import TOKEN_VARIABLE
from weightline.serving.http.client import read_address
from weightline.stages.load import load_recipe
from weightline.stages.model import materialize_model

#: (lookahead, staleness): the synchronous training first.
SETTINGS = ((0, 0), (1, 2))
_ROLLOUTS_ROUTE = "/weightline/rollouts"
_OWN_HEADERS = frozenset(("host", "connection", "content-length", "transfer-encoding", "accept-encoding"))


@dataclass(frozen=True)
class Trained:
    """One training."""

    lookahead: int
    staleness: int
    seconds: float
    """From the first version to the last one."""
    waits: tuple[float, ...]
    """Seconds for which training stood still, by step."""
    oldest: int
    """Greatest age, in versions, of a completion that was trained on."""


def share_of_even_characters(completions: list[str], **_: Any) -> list[float]:
    """Returns the rewards: random weights can earn them, so that every step changes something."""
    return [sum(ord(one) % 2 == 0 for one in text) / max(1, len(text)) for text in completions]


def main() -> None:
    """Prints a row for each training, and the ratio of their times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--delay", type=float, default=4.0, help="seconds that each answer with completions takes more")
    parser.add_argument("--steps", type=int, default=10)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="weightline-bench-") as name:
        found = [_measure(Path(name), args.delay, args.steps, *setting) for setting in SETTINGS]
    print(
        f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores; {args.steps} steps, {args.delay:g} s a request more"
    )
    _print(found, args.steps)


def _measure(folder: Path, delay_seconds: float, num_steps: int, lookahead: int, staleness: int) -> Trained:
    """Trains once, with a chain and a replica of its own."""
    rollouts = {"lookahead": lookahead, "staleness": staleness, "replicas": "follow"}
    run = _prepared(folder, f"lookahead-{lookahead}", num_steps, rollouts)
    job = run.job("grpo")
    job.output_dir.mkdir(parents=True)
    token = os.urandom(16).hex()
    with _slow_replica(run.chain_url, folder / f"replica-{lookahead}", delay_seconds, token):
        # The token lets rank 0 push each version to the replica.
        run_stage(run, job, {TOKEN_VARIABLE: token}, show=lambda line: None, tick=lambda: None)
    manifests = run.open_chain().manifests()
    first, last = (parse_time(one.created_at) for one in (manifests[0], manifests[-1]))
    assert first is not None
    assert last is not None
    metrics = MetricsFollower(job.metrics_path)
    metrics.refresh()
    steps = [line for line in metrics.history if "rollout/wait_seconds" in line]
    return Trained(
        lookahead, staleness, (last - first).total_seconds(),
        tuple(line["rollout/wait_seconds"] for line in steps),
        int(max(line["rollout/staleness_max"] for line in steps)),
    )  # fmt: skip


def _prepared(folder: Path, name: str, num_steps: int, rollouts: dict[str, Any]) -> Run:
    """Returns the run of the shipped recipe's GRPO stage, with its model as it is before any training."""
    recipe = load_recipe("arithmetic").model_dump(mode="json")
    (stage,) = (stage for stage in recipe["stages"] if stage["kind"] == "grpo")
    stage |= {"max_steps": num_steps, "rollouts": rollouts}
    stage["reward"] = "benchmarks.rollout_bench:share_of_even_characters"
    stage["trainer_args"] |= {"logging_steps": 1}
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(recipe | {"name": name, "stages": [stage]}))  # JSON is YAML
    run = prepare_run(path, folder, name)
    materialize_model(run.recipe.model, run.start_model_dir, run.recipe.seed, run.recipe.dtype)
    return run


@contextmanager
def _slow_replica(chain_url: str, state_dir: Path, delay_seconds: float, token: str) -> Iterator[None]:
    """Runs a replica of the chain that others reach through the proxy alone."""
    state_dir.mkdir()
    env = os.environ | {TOKEN_VARIABLE: token, "OMP_NUM_THREADS": "1"}
    with _proxy(state_dir, delay_seconds) as url, (state_dir / "log").open("wb") as log:
        argv = [sys.executable, "-m", "weightline", "serve", "transformers", "--follow", chain_url, "--port", "0"]
        argv += ["--state-dir", str(state_dir), "--every", "0.2", "--advertise", url]
        process = subprocess.Popen(argv, env=env, stdout=log, stderr=subprocess.STDOUT)
        try:
            yield
        finally:
            process.terminate()
            process.wait()


@contextmanager
def _proxy(state_dir: Path, delay_seconds: float) -> Iterator[str]:
    """Yields the URL of a proxy before the replica of the folder, which may start later."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config = uvicorn.Config(_proxy_app(state_dir, delay_seconds), log_level="error", timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


def _proxy_app(state_dir: Path, delay_seconds: float) -> Starlette:
    client = httpx.AsyncClient(trust_env=False, timeout=None, headers={"accept-encoding": "identity"})

    @asynccontextmanager
    async def closing(_: Starlette) -> AsyncIterator[None]:
        async with client:
            yield

    async def forward(request: Request) -> Response:
        replica = read_address(state_dir)
        if replica is None:
            return Response(status_code=503)
        url = httpx.URL(replica + request.url.path, query=request.url.query.encode())
        try:
            answer = await client.request(
                request.method, url, content=await request.body(), headers=_passed_on(request.headers.items())
            )
        except httpx.TransportError:
            return Response(status_code=503)
        if request.url.path == _ROLLOUTS_ROUTE:
            await asyncio.sleep(delay_seconds)
        return Response(answer.content, answer.status_code, dict(_passed_on(answer.headers.items())))

    return Starlette(routes=[Route("/{path:path}", forward, methods=["GET", "POST"])], lifespan=closing)


def _passed_on(headers: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(name, value) for name, value in headers if name.lower() not in _OWN_HEADERS]


def _print(found: Sequence[Trained], num_steps: int) -> None:
    table = Table("lookahead", "staleness", "seconds", "a step", "wait a step", "oldest completion")
    for one in found:
        table.add_row(
            str(one.lookahead), str(one.staleness), f"{one.seconds:.1f}", f"{one.seconds / num_steps:.2f}",
            f"{statistics.mean(one.waits):.2f}", f"{one.oldest} versions",
        )  # fmt: skip
    console = Console(width=120, highlight=False)
    console.print(table)
    synchronous, ahead = found
    console.print(f"with lookahead: {ahead.seconds / synchronous.seconds:.2f} of the synchronous time")


if __name__ == "__main__":
    main()
