"""Compares a Hub bucket with the plain huggingface_hub client in one run, and measures until a commit is visible.

python -m benchmarks.hub_bench [--mib 64] [--repeats 5] [--settle-seconds 2]

The Hub is the tests' emulator in a process of its own on this machine, and shares the cores with the clients. So
megabytes per second do not carry over, and the report shows the CPU seconds of both sides. If no core is free, the work
that a client does in parallel with its transfer slows the transfer.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from benchmarks.commit_latency import PAYLOADS, commit_latency
from benchmarks.timing import wall_seconds
from weightline.store import Store

_BUCKET = "user/bench"
_MODES = {"claims": False, "s3-gateway": True}


@dataclass(slots=True)
class Runs:
    """The wall seconds and the CPU seconds, here and in the Hub, of each run of one client in one direction."""

    wall: list[float] = field(default_factory=list)
    client: list[float] = field(default_factory=list)
    hub: list[float] = field(default_factory=list)

    def add(self, hub: psutil.Process, work: Callable[[], object]) -> None:
        hub_before, client_before = sum(hub.cpu_times()[:2]), time.process_time()
        self.wall.append(wall_seconds(work))
        self.client.append(time.process_time() - client_before)
        self.hub.append(sum(hub.cpu_times()[:2]) - hub_before)

    def cpu(self) -> str:
        """Returns the median CPU seconds as text. They are reproducible on a busy machine; wall seconds are not."""
        return f"{statistics.median(self.client):.2f} s + the Hub's {statistics.median(self.hub):.2f} s"


@contextmanager
def _hub(folder: Path, settle_seconds: float) -> Iterator[tuple[str, psutil.Process]]:
    """Yields URL and process of the emulator, and sets the clients' environment to it."""
    argv = [sys.executable, "-m", "tests.hub_emulator", "--root", str(folder / "hub")]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        url = server.stdout.readline().strip()
        os.environ |= {
            "HF_ENDPOINT": url, "HF_TOKEN": "hf_bench", "HF_HOME": str(folder / "home"),
            "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_XET_TELEMETRY_ENABLED": "0", "WEIGHTLINE_CACHE_NBYTES": "0",
            "WEIGHTLINE_HUB_SETTLE_SECONDS": str(settle_seconds),
        }  # fmt: skip
        try:
            yield url, psutil.Process(server.pid)
        finally:
            server.terminate()


def _throughput(store: Store, url: str, hub: psutil.Process, folder: Path, nbytes: int, repeats: int) -> None:
    """Lets the clients take turns, in alternating order, with new bytes each time because the Hub deduplicates."""
    from huggingface_hub import HfApi

    api = HfApi(endpoint=url)
    source, copy = folder / "source", folder / "copy"
    contenders: dict[str, tuple[Callable[[str], object], Callable[[str], object]]] = {
        "weightline": (lambda key: store.put_file(key, source), lambda key: store.get_file(key, copy)),
        "huggingface_hub": (
            lambda key: api.batch_bucket_files(_BUCKET, add=[(source, key)]),
            lambda key: api.download_bucket_files(_BUCKET, [(key, copy)]),
        ),
    }
    runs = {direction: {name: Runs() for name in contenders} for direction in ("upload", "download")}
    for number in range(repeats):
        for name in sorted(contenders, reverse=number % 2 == 0):
            upload, download = contenders[name]
            key = f"payload-{uuid.uuid4().hex}"
            source.write_bytes(os.urandom(nbytes))
            runs["upload"][name].add(hub, lambda: upload(key))  # noqa: B023
            runs["download"][name].add(hub, lambda: download(key))  # noqa: B023
            assert copy.stat().st_size == nbytes
            copy.unlink()
    for direction, by_name in runs.items():
        print(_compared(direction, nbytes, by_name["weightline"], by_name["huggingface_hub"]))


def _compared(direction: str, nbytes: int, ours: Runs, theirs: Runs) -> str:
    best, plain = min(ours.wall), min(theirs.wall)
    median = statistics.median(theirs / ours for ours, theirs in zip(ours.wall, theirs.wall, strict=True))
    return (
        f"{direction:9} {nbytes / best / 1e6:6.0f} MB/s, {plain / best:.2f} x huggingface_hub "
        f"({nbytes / plain / 1e6:.0f} MB/s) by the best of {len(ours.wall)}, {median:.2f} x by the median of pairs; "
        f"CPU: {ours.cpu()}, plain {theirs.cpu()}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=64, help="Size of the file that goes up and down.")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--settle-seconds", type=float, default=2.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="weightline-bench-") as name:
        folder = Path(name)
        with _hub(folder, options.settle_seconds) as (url, hub):
            from weightline.store.hub.store import open_hub

            for mode, has_keys in _MODES.items():
                if has_keys:
                    os.environ |= {
                        "HF_S3_ACCESS_KEY_ID": "HFAKbench", "HF_S3_SECRET_ACCESS_KEY": "bench",
                        "HF_S3_ENDPOINT": f"{url}/s3",
                    }  # fmt: skip
                store = open_hub(f"hf://buckets/{_BUCKET}/{mode}")
                store.put_if_absent("warm", b"up")
                if mode == "claims":
                    _throughput(store, url, hub, folder, options.mib * 2**20, options.repeats)
                latency = commit_latency(store, folder, options.repeats)
                settled = f", of which {options.settle_seconds} s settling" if mode == "claims" else ""
                print(f"encoded to visible, {mode}: {latency:.2f} s{settled} ({PAYLOADS})")


if __name__ == "__main__":
    main()
