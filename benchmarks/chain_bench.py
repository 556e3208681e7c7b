"""Measures what the verbs of a chain cost: versions V, tensors T, changed tensors C, and large models.

    python -m benchmarks.chain_bench                        # V = 10,000, T = 36,000, a 2 GB and a 1.2 GB model: an hour
    python -m benchmarks.chain_bench --small                # under a minute

Chains of tiny tensors lie in a folder, behind a store that counts the requests that an object store would be asked.
Each verb runs in a process of its own. Its CPU time is that of all threads, and its memory what it adds at its peak to
that of a process that has imported everything. Wide chains (T) have few versions, long ones (V) `--narrow` tensors. The
goals are for the default sizes.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.large_model import LARGE, QWEN3, save_model, save_step, small_shapes
from benchmarks.long_chain import BitsEngine, ChainMaker, MeteredStore, metered, resident_nbytes
from weightline.chain.files.checkpoint import write_checkpoint
from weightline.chain.read.history import Chain
from weightline.chain.replay.plan import plan_between
from weightline.chain.upkeep.compact import CompactionPlan, plan_compaction, write_compaction
from weightline.chain.upkeep.gc import host_clock, plan_gc, view_chain
from weightline.chain.upkeep.verify import verify_chain
from weightline.chain.write.revert import commit_revert
from weightline.chain.write.standalone import commit_folder
from weightline.cli.main import app
from weightline.dashboard.index import ChainIndex
from weightline.format import keys
from weightline.serving.replica.replica import Replica
from weightline.store.local import LocalStore

#: Versions of a wide chain.
_NUM_WIDE = 5


@dataclass(slots=True)
class Cost:
    """What one call cost."""

    cpu_seconds: float = 0.0
    wall_seconds: float = 0.0
    peak_nbytes: int = 0
    """Memory at its peak, over that before the call."""
    requests: dict[str, int] = field(default_factory=dict)
    read_nbytes: dict[str, int] = field(default_factory=dict)
    note: str = ""

    @property
    def num_requests(self) -> int:
        return sum(self.requests.values())

    def text(self) -> str:
        parts = [f"{self.cpu_seconds:.2f} s CPU, {self.wall_seconds:.2f} s", f"+{self.peak_nbytes / 1e6:.0f} MB"]
        if self.requests:
            beside = sum(n for folder, n in self.read_nbytes.items() if folder != "payloads")
            kinds = ", ".join(f"{n} {verb}" for verb, n in sorted(self.requests.items()))
            parts.append(f"{self.num_requests} requests ({kinds}), {beside / 1e3:.1f} kB beside payloads")
        return "; ".join([*parts, *([self.note] if self.note else [])])


@contextmanager
def measured(store: MeteredStore | None = None) -> Iterator[Cost]:
    """Fills in the cost of the block when it ends."""
    cost = Cost()
    if store is not None:
        store.reset()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before, started, cpu = resident_nbytes(), time.perf_counter(), _cpu_seconds()
    yield cost
    cost.cpu_seconds, cost.wall_seconds = _cpu_seconds() - cpu, time.perf_counter() - started
    cost.peak_nbytes = max(0, _peak_nbytes() - before)
    if store is not None:
        cost.requests = {verb: n for verb, n in store.requests.items() if n}
        cost.read_nbytes = dict(store.read_nbytes)


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _peak_nbytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


@dataclass(frozen=True, slots=True)
class Places:
    """The chains and models that the verbs run on."""

    work: Path

    @property
    def wide(self) -> Path:
        return self.work / "wide"

    @property
    def long(self) -> Path:
        return self.work / "long"


def manifest_size(places: Places) -> Cost:
    chain, store = metered(places.wide)
    tip = chain.tip().version
    with measured(store) as cost:
        Chain(store).manifest(tip)
    cost.note = f"{len(store.inner.get(keys.commit(tip))) / 1e3:.1f} kB of manifest"
    return cost


def refresh_by_one(root: Path) -> Cost:
    """A replica at the version before the tip moves to it."""
    with tempfile.TemporaryDirectory() as state:
        chain, store = metered(root)
        tip = chain.tip().version
        replica = Replica(chain, BitsEngine(), Path(state), "bench")
        replica.refresh(tip - 2)
        replica.refresh(tip - 1)
        with measured(store) as cost:
            replica.refresh(tip)
    return cost


def follow(places: Places) -> Cost:
    """A replica moves through the newest tenth of the versions, one by one. It has moved a few times before."""
    with tempfile.TemporaryDirectory() as state:
        chain, store = metered(places.long)
        tip = chain.tip().version
        num_versions = max(2, tip // 10)
        replica = Replica(chain, BitsEngine(), Path(state), "bench")
        for version in range(tip - num_versions - 10, tip - num_versions + 1):
            replica.refresh(max(0, version))
        before = resident_nbytes()
        with measured(store) as cost:
            for version in range(tip - num_versions + 1, tip + 1):
                replica.refresh(version)
        cost.note = f"{num_versions} versions: {(resident_nbytes() - before) / 1e6:+.1f} MB"
    return cost


def one_more_commit(places: Places) -> Cost:
    """The payload and the manifest of a version with a few changed tensors, whose state is at hand."""
    from weightline.chain.write.commit import commit_manifest, new_commit_id
    from weightline.format.manifest import PayloadRef

    chain, store = metered(places.wide)
    tip = chain.tip()
    path = places.wide / tip.payloads[0].key
    with measured(store) as cost:
        commit_id, version = new_commit_id(), tip.version + 1
        ref = PayloadRef(
            key=keys.payload(version, commit_id, 0), nbytes=path.stat().st_size, sha256=tip.payloads[0].sha256, rank=0
        )
        store.put_file(ref.key, path)
        update = {"version": version, "base_version": tip.version, "commit_id": commit_id, "payloads": (ref,)}
        commit_manifest(chain, tip.model_copy(update=update))
    cost.note = f"{len(store.inner.get(keys.commit(tip.version + 1))) / 1e3:.1f} kB of manifest"
    store.inner.delete(keys.commit(tip.version + 1), ref.key)
    store.inner.put(keys.TIP_HINT, json.dumps({"version": tip.version}).encode())
    return cost


def join_near_anchor(places: Places) -> Cost:
    """A pull of the tip, with an anchor ten versions before it."""
    chain, store = metered(places.long)
    tip = chain.tip().version
    write_compaction(chain, CompactionPlan(tip - 10, (), {}, writes_anchor=True), coding="gap")
    with tempfile.TemporaryDirectory() as out, measured(store) as cost:
        write_checkpoint(Chain(store), tip, Path(out) / "pulled")
    return cost


def plan_of_one_step(places: Places) -> Cost:
    """With a thousand shortcuts into the tip. Keys are all that a plan could look at."""
    chain, store = metered(places.long)
    tip = chain.tip().version
    made = [keys.shortcut(base, tip) for base in range(max(0, tip - 1000), tip)]
    for key in made:
        store.inner.put(key, b"{}")
    with measured(store) as cost:
        plan_between(Chain(store), tip - 1, tip)
    store.inner.delete(*made)
    return cost


def compact(places: Places) -> Cost:
    """Plans a compaction of new versions, a thousandth of the chain, some time after one of all of it."""
    chain, store = metered(places.long)
    tip = chain.tip().version
    earlier = _until(chain, tip - max(1, tip // 1000))
    with _without_fsync():
        plan = plan_compaction(earlier, coding="gap")
        write_compaction(earlier, plan, coding="gap")
    with measured(store) as cost:
        plan = plan_compaction(Chain(store), coding="gap")
    cost.note = f"{len(plan.direct_nbytes)} versions looked at, {len(plan.bases)} shortcuts"
    return cost


@contextmanager
def _without_fsync() -> Iterator[None]:
    """For what is made and not measured."""
    fsync, os.fsync = os.fsync, lambda _: None
    try:
        yield
    finally:
        os.fsync = fsync


def _until(chain: Chain, version: int) -> Chain:
    """Returns the chain as it was when `version` was its tip."""

    class Earlier(Chain):
        def tip_version(self) -> int | None:
            return version

        def versions(self, first: int = 0, last: int | None = None) -> tuple[int, ...]:
            return super().versions(first, version if last is None else min(last, version))

    return Earlier(chain.store)


def collect_garbage(places: Places) -> Cost:
    _, store = metered(places.long)
    with measured(store) as cost:
        plan = plan_gc(view_chain(Chain(store), host_clock))
    cost.note = f"{len(plan.objects)} objects to delete"
    return cost


def verify_quick(places: Places) -> Cost:
    _, store = metered(places.long)
    with measured(store) as cost:
        report = verify_chain(Chain(store), is_deep=False)
    cost.note = "all holds" if report.holds else f"{len(report.findings)} findings"
    return cost


def command(root: Path, *argv: str) -> Cost:
    """A command of `weightline`, with a store that counts in place of the folder's."""
    store = MeteredStore(LocalStore(root))
    import weightline.chain.read.history as history

    history.open_store = lambda url, patience=None: store  # type: ignore[assignment]
    with measured(store) as cost, contextlib.redirect_stdout(io.StringIO()):
        app([argv[0], root.as_uri(), *argv[1:]], standalone_mode=False)
    return cost


def dashboard(places: Places) -> Cost:
    _, store = metered(places.long)
    with ThreadPoolExecutor(8) as pool, measured(store) as cost:
        ChainIndex(Chain(store), pool).refresh()
    return cost


def large_commit(places: Places) -> Cost:
    with measured() as cost:
        commit_folder(Chain(LocalStore(places.work / "large-chain")), places.work / "large")
    return cost


def large_pull(places: Places) -> Cost:
    with tempfile.TemporaryDirectory(dir=places.work) as out, measured() as cost:
        write_checkpoint(Chain(LocalStore(places.work / "large-chain")), 0, Path(out) / "pulled")
    return cost


def step_commit(places: Places, coding: str) -> Cost:
    """A first version, and then a folder in which an optimizer step changed 2.4 % of the elements."""
    root = places.work / f"step-{coding}"
    if not root.exists():
        shutil.copytree(places.work / "step-chain", root)
    with measured() as cost:
        manifest = commit_folder(Chain(LocalStore(root)), places.work / "step-1", coding=coding)
    cost.note = f"{manifest.num_changed / manifest.num_elements:.2%} changed, {manifest.payload_nbytes / 1e6:.1f} MB"
    return cost


def step_revert(places: Places, coding: str) -> Cost:
    with measured() as cost:
        commit_revert(Chain(LocalStore(places.work / f"step-{coding}")), 0)
    return cost


@dataclass(frozen=True, slots=True)
class Row:
    """A row of the table."""

    verb: str
    goal: str
    run: Callable[[Places], Cost]


ROWS: dict[str, Row] = {
    "manifest": Row("manifest of a version, T, C", "4 kB + 40 B x C + 60 B x W", manifest_size),
    "commit": Row("one more commit, T, C", "20 ms CPU, 8 kB beside the payload", one_more_commit),
    "refresh-wide": Row("refresh by one, T", "60 ms CPU, 64 kB beside the payload", lambda p: refresh_by_one(p.wide)),
    "refresh-long": Row("refresh by one, V", "6 requests, flat in V", lambda p: refresh_by_one(p.long)),
    "join": Row("pull near an anchor, V", "in proportion to the way from the anchor", join_near_anchor),
    "plan": Row("plan of one step, 1,000 shortcuts", "4 requests", plan_of_one_step),
    "follow": Row("a replica follows V/10 versions", "flat: 20 MB", follow),
    "compact": Row("compact, V/1000 new versions", "linear in new versions; 200 MB", compact),
    "gc": Row("gc, nothing to delete, V", "V/500 requests; 200 MB", collect_garbage),
    "verify": Row("verify --quick, V", "each object once; 200 MB", verify_quick),
    "show": Row("show, V", "25 requests", lambda p: command(p.long, "show")),
    "log": Row("log --limit 20, V", "25 requests", lambda p: command(p.long, "log", "--limit", "20")),
    "dashboard": Row("dashboard, first look, V", "0.3 s CPU, 60 requests", dashboard),
    "large-commit": Row("2 GB: commit FOLDER, anchor", "25 s CPU, peak 0.5 GB", large_commit),
    "large-pull": Row("2 GB: pull", "12 s CPU, peak 0.5 GB", large_pull),
    "step-commit": Row(
        "1.2 GB, 2.4 %: commit FOLDER", "5 s CPU, peak 0.5 GB", lambda p: step_commit(p, "gap-by-magnitude")
    ),
    "step-revert": Row("1.2 GB, 2.4 %: revert", "5 s", lambda p: step_revert(p, "gap-by-magnitude")),
    "gap-commit": Row("1.2 GB, 2.4 %, gap: commit FOLDER", "5 s CPU, peak 0.5 GB", lambda p: step_commit(p, "gap")),
    "gap-revert": Row("1.2 GB, 2.4 %, gap: revert", "5 s", lambda p: step_revert(p, "gap")),
}
_LARGE_ROWS = ("large-commit", "large-pull", "step-commit", "step-revert", "gap-commit", "gap-revert")


def main() -> None:
    """Makes the chains and models, measures every row in a process of its own, and prints the table."""
    args = _parsed()
    if args.run:
        print(json.dumps(asdict(ROWS[args.run].run(Places(args.work)))))
        return
    console = Console(width=190, highlight=False)
    with tempfile.TemporaryDirectory(prefix="weightline-bench-", dir=args.work) as name:
        places = Places(Path(name))
        names = args.rows or list(ROWS)
        _make(places, args, names)
        table = Table("verb", "measured", "goal", "load")
        for row in names:
            cost = _in_a_process(row, places)
            table.add_row(ROWS[row].verb, cost.text(), ROWS[row].goal, f"{os.getloadavg()[0]:.1f}")
            console.print(f"{ROWS[row].verb}: {cost.text()}")
    console.print(f"V = {args.versions} of {args.narrow} tensors, T = {args.tensors}, C = {args.changed}")
    console.print(table)


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="V = 300, T = 1000, models of 20 MB")
    parser.add_argument("--versions", type=int, help="V: versions of the long chain")
    parser.add_argument("--tensors", type=int, help="T: tensors of the wide chain")
    parser.add_argument("--narrow", type=int, default=20, help="tensors of the long chain")
    parser.add_argument("--changed", type=int, default=4, help="C: changed tensors of a version")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), help="only these, in this order")
    parser.add_argument("--work", type=Path, help="where temporary files go: 10 GB and more")
    parser.add_argument("--run", choices=list(ROWS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.versions = args.versions or (300 if args.small else 10_000)
    args.tensors = args.tensors or (1000 if args.small else 36_000)
    return args


def _make(places: Places, args: argparse.Namespace, names: list[str]) -> None:
    if set(names) - set(_LARGE_ROWS):
        ChainMaker(places.wide, args.tensors, args.changed).grow(_NUM_WIDE)
        ChainMaker(places.long, args.narrow, args.changed).grow(args.versions)
    if {"large-commit", "large-pull"} & set(names):
        save_model(places.work / "large", small_shapes(LARGE) if args.small else LARGE)
    if any(name.startswith(("step", "gap")) for name in names):
        save_model(places.work / "step-0", small_shapes(QWEN3) if args.small else QWEN3)
        save_step(places.work / "step-0", places.work / "step-1")
        commit_folder(Chain(LocalStore(places.work / "step-chain")), places.work / "step-0")


def _in_a_process(row: str, places: Places) -> Cost:
    argv = [sys.executable, "-m", "benchmarks.chain_bench", "--run", row, "--work", str(places.work)]
    done = subprocess.run(argv, stdout=subprocess.PIPE, text=True, check=True)
    return Cost(**json.loads(done.stdout.splitlines()[-1]))


if __name__ == "__main__":
    main()
