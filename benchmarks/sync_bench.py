"""Measures a version's way from the end of an optimizer step to a replica's first answer, and where the time goes.

    python -m benchmarks.sync_bench                    # Qwen3-0.6B's shape, three buckets, both engines: 15 minutes
    python -m benchmarks.sync_bench --small            # a few million elements, one bucket: under a minute

Two trainer ranks hold a model with random bf16 weights in halves (FSDP 2) and publish a version after each simulated
optimizer step, by the code that the callback runs. A replica serves the chain: the embedded server, and vLLM where
it is installed. The rank that commits pushes each version to it. A client asks for a token of the next version before
that exists, and waits for the answer. The parts, which add up:

    capture    the trainer's own thread stands still until the last rank has its changes
    encode     the ranks sum digests and write payload files (the last rank counts, as above and below)
    upload     the payloads go to the bucket
    commit     rank 0 gathers what was uploaded and puts the manifest; with the Hub, until the bucket shows it
    notice     until the replica begins: by the push, or at its next look with --follow
    plan       the replica reads the manifest and compares its own version with the bucket's
    fetch      it waits for payloads
    read base  it reads the bits that the changes start from out of the engine
    decode     it decodes the changes and proves the digests after them
    stage      the engine finds the places of the changes
    drain      requests in flight end, new ones wait
    pause      the changes are written and read back
    answer     until the client has the first token of the version

Training and serving share this machine, and nothing trains while a version is on its way. The first version of each
replica warms everything up and is not shown. Of the others, the table shows the one that was served first, and from
all of them the median of the time until a version was served.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from benchmarks.sync_places import BUCKETS, FirstAnswer, RunningReplica, running_replica, vllm_python
from weightline.serving.http.auth import TOKEN_VARIABLE
from weightline.store.cache import FOLDER_VARIABLE

if TYPE_CHECKING:
    from benchmarks.sync_ranks import RankTimes, TrainerRanks

PARTS = (
    "capture", "encode", "upload", "commit", "notice", "plan", "fetch", "read base", "decode", "stage", "drain",
    "pause", "answer",
)  # fmt: skip
#: About 2.4 % of Qwen3's elements.
_STEP_SIZE = 5.1e-7
#: About 0.1, 0.3, 1, 5 and 10 % of them.
_CURVE = (1.3e-8, 5e-8, 1.8e-7, 1.25e-6, 3e-6)
_PUSHED_FOLLOW_SECONDS = 5.0
_LABELS = {"transformers": "embedded", "vllm": "vLLM"}


@dataclass(frozen=True, slots=True)
class Sync:
    """One version's way."""

    bucket: str
    engine: str
    step_size: float
    num_changed: int
    share_changed: float
    payload_nbytes: int
    seconds: dict[str, float]
    """By part, in their order."""

    @property
    def served_seconds(self) -> float:
        """From the end of the optimizer step until the version was served."""
        return sum(self.seconds.values()) - self.seconds["answer"]

    @property
    def prepare_seconds(self) -> float:
        return sum(self.seconds[part] for part in ("plan", "fetch", "read base", "decode"))


def main() -> None:
    """Measures and prints two tables: where the time goes, and the curve over the share of changed elements."""
    args = _parsed()
    console = Console(width=140, highlight=False)
    engines = _engines(args, console)
    with tempfile.TemporaryDirectory(prefix="weightline-bench-", dir=args.work) as name, ExitStack() as running:
        folder = Path(name)
        os.environ |= {TOKEN_VARIABLE: secrets.token_hex(16), FOLDER_VARIABLE: str(folder / "cache")}
        urls = {bucket: running.enter_context(BUCKETS[bucket](folder)) for bucket in args.buckets}
        # The libraries of the Hub read the environment when they are imported, which the buckets have set by now.
        from benchmarks.sync_ranks import SHAPES, trainer_ranks

        shape = "small" if args.small else "Qwen3-0.6B"
        ranks = running.enter_context(trainer_ranks(SHAPES[shape], folder))
        console.print(f"a Qwen3 of the shape {shape}: {ranks.num_elements:,} elements; {os.cpu_count()} cores")
        bench = _Bench(ranks, engines, args, folder, console)
        syncs = [sync for bucket, url in urls.items() for sync in bench.measure(bucket, f"{url}/sync")]
    console.print(f"load {os.getloadavg()[0]:.1f}")
    console.print(split_table([sync for sync in syncs if sync.step_size == args.step_size]))
    if args.curve:
        console.print(curve_table([sync for sync in syncs if sync.bucket == args.buckets[0]]))
    if args.out:
        args.out.write_text(json.dumps([asdict(sync) for sync in syncs], indent=1))


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a few million elements, one bucket, one version each")
    parser.add_argument("--buckets", nargs="+", choices=list(BUCKETS), help="the curve is measured over the first one")
    parser.add_argument("--engines", nargs="+", choices=("transformers", "vllm"), default=["transformers", "vllm"])
    parser.add_argument("--repeats", type=int, help="versions of each bucket, engine and step")
    parser.add_argument("--step-size", type=float, default=_STEP_SIZE, help="how far a step moves each weight")
    parser.add_argument("--curve", nargs="*", type=float, help="further step sizes; none without a number")
    parser.add_argument(
        "--follow", type=float, metavar="SECONDS", help="push nothing: the replica looks for versions so often"
    )
    parser.add_argument("--vllm-python", type=Path, default=vllm_python(), help="a Python that has vLLM")
    parser.add_argument("--work", type=Path, help="where temporary files go: twice the model and more")
    parser.add_argument("--out", type=Path, help="all versions as JSON")
    args = parser.parse_args()
    args.buckets = args.buckets or (["file"] if args.small else list(BUCKETS))
    args.repeats = args.repeats or (1 if args.small else 3)
    args.curve = (_CURVE[:1] if args.small else _CURVE) if args.curve is None else args.curve
    return args


def _engines(args: argparse.Namespace, console: Console) -> dict[str, Path]:
    """Returns the Python of each engine to measure."""
    found = {"transformers": Path(sys.executable), "vllm": args.vllm_python}
    if "vllm" in args.engines and found["vllm"] is None:
        console.print("no vLLM in this Python and no .venv-vllm (make test-vllm): the embedded server only")
    return {engine: found[engine] for engine in args.engines if found[engine] is not None}


class _Bench:
    """Measures chain by chain."""

    def __init__(
        self, ranks: TrainerRanks, engines: dict[str, Path], args: argparse.Namespace, folder: Path, console: Console
    ) -> None:
        self._ranks, self._engines, self._args = ranks, engines, args
        self._folder, self._console = folder, console
        self._began = time.monotonic()

    def measure(self, bucket: str, chain_url: str) -> Iterator[Sync]:
        """Yields the syncs of one bucket: the engines one after the other, on one chain."""
        args = self._args
        version = self._ranks.open(chain_url, args.follow is None)
        self._say(f"{bucket}: the first version is committed")
        step_sizes = [args.step_size, *(args.curve if bucket == args.buckets[0] else ())]
        for engine, python in self._engines.items():
            state_dir = self._folder / f"{bucket}-{engine}"
            every = args.follow or _PUSHED_FOLLOW_SECONDS
            # When a rank fails, the replica ends first, and with it the client's wait.
            with ThreadPoolExecutor(1) as pool, running_replica(engine, python, chain_url, state_dir, every) as replica:
                self._say(f"{bucket}, {engine}: serves version {version}")
                version += 1
                self._sync(pool, replica, version, args.step_size)  # warms up
                self._say(f"{bucket}, {engine}: warm")
                for step_size in step_sizes:
                    for _ in range(args.repeats):
                        version += 1
                        times, first = self._sync(pool, replica, version, step_size)
                        yield self._told(bucket, engine, step_size, times, first)
        self._ranks.close()

    def _sync(
        self, pool: Executor, replica: RunningReplica, version: int, step_size: float
    ) -> tuple[list[RankTimes], FirstAnswer]:
        waiting = pool.submit(replica.first_answer, version)
        return self._ranks.sync(step_size), waiting.result()

    def _told(self, bucket: str, engine: str, step_size: float, times: Sequence[RankTimes], first: FirstAnswer) -> Sync:
        facts = first.facts
        sync = Sync(
            bucket, engine, step_size, facts.num_changed, facts.num_changed / self._ranks.num_elements,
            facts.payload_nbytes, split(times, first),
        )  # fmt: skip
        self._say(
            f"{bucket}, {engine}: {sync.share_changed:.2%} changed, served after {sync.served_seconds:.2f} s, "
            f"paused {facts.pause_seconds:.3f} s"
        )
        return sync

    def _say(self, text: str) -> None:
        self._console.print(f"{time.monotonic() - self._began:6.1f} s  {text}")


def split(times: Sequence[RankTimes], first: FirstAnswer) -> dict[str, float]:
    """Returns the seconds of each part. A negative notice: the replica began before rank 0 knew of its own commit."""
    stepped, captured, encoded, uploaded = (
        max(getattr(one, name) for one in times) for name in ("stepped", "captured", "encoded", "uploaded")
    )
    facts, committed = first.facts, times[0].committed
    moved = facts.prepare_seconds + facts.stage_seconds + facts.drain_seconds + facts.pause_seconds
    parts = (facts.fetch_seconds, facts.read_base_seconds, facts.decode_seconds)
    found = (
        captured - stepped, encoded - captured, uploaded - encoded, committed - uploaded,
        first.served - committed - moved, facts.prepare_seconds - sum(parts), *parts,
        facts.stage_seconds, facts.drain_seconds, facts.pause_seconds, first.answered - first.served,
    )  # fmt: skip
    return dict(zip(PARTS, found, strict=True))


def split_table(syncs: Sequence[Sync]) -> Table:
    """Returns the table of parts: a column for each bucket and engine."""
    columns = {(one.bucket, one.engine): [] for one in syncs}
    for one in syncs:
        columns[one.bucket, one.engine].append(one)
    best = [min(column, key=lambda one: one.served_seconds) for column in columns.values()]
    table = Table("seconds", *(f"{bucket}: {_LABELS[engine]}" for bucket, engine in columns))
    for part in PARTS[:-1]:
        table.add_row(part, *(f"{one.seconds[part]:.3f}" for one in best))
    table.add_section()
    table.add_row("served", *(f"{one.served_seconds:.2f}" for one in best))
    medians = [statistics.median(one.served_seconds for one in column) for column in columns.values()]
    table.add_row("median of all", *(f"{one:.2f}" for one in medians))
    table.add_row("first answer", *(f"{one.served_seconds + one.seconds['answer']:.2f}" for one in best))
    table.add_section()
    table.add_row("payload, MB", *(f"{one.payload_nbytes / 1e6:.1f}" for one in best))
    table.add_row("changed", *(f"{one.share_changed:.2%}" for one in best))
    return table


def curve_table(syncs: Sequence[Sync]) -> Table:
    """Returns the curve over the share of changed elements: a row for each engine and step size."""
    table = Table(
        "engine", "step", "changed", "payload, MB", "B a change", "capture", "to commit", "prepare", "stage", "pause",
        "served",
    )  # fmt: skip
    groups: dict[tuple[str, float], list[Sync]] = {}
    for one in syncs:
        groups.setdefault((one.engine, one.step_size), []).append(one)
    for (engine, step_size), group in sorted(groups.items()):
        one = min(group, key=lambda one: one.served_seconds)
        to_commit = sum(one.seconds[part] for part in ("capture", "encode", "upload", "commit"))
        table.add_row(
            _LABELS[engine], f"{step_size:g}", f"{one.share_changed:.2%}", f"{one.payload_nbytes / 1e6:.2f}",
            f"{one.payload_nbytes / one.num_changed:.2f}", f"{one.seconds['capture']:.3f}", f"{to_commit:.3f}",
            f"{one.prepare_seconds:.3f}", f"{one.seconds['stage']:.3f}", f"{one.seconds['pause']:.3f}",
            f"{one.served_seconds:.2f}",
        )  # fmt: skip
    return table


if __name__ == "__main__":
    main()
