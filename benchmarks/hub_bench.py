"""A Hub bucket against the plain huggingface_hub client, in one run; and how long a commit takes to show.

python -m benchmarks.hub_bench [--mib 64] [--repeats 5] [--settle-seconds 2]

The Hub is the tests' emulator, a process of its own on this machine, which shares its cores with the clients: ratios
carry over, megabytes a second do not.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.commit_latency import PAYLOADS, commit_latency
from benchmarks.timing import wall_seconds
from weightline.store import Store

_BUCKET = "user/bench"
_MODES = {"claims": False, "s3-gateway": True}


@contextmanager
def _hub(folder: Path, settle_seconds: float) -> Iterator[str]:
    """The emulator's URL, with an environment that leads to it. The clients' caches end with it."""
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
            yield url
        finally:
            server.terminate()


def _throughput(store: Store, url: str, folder: Path, nbytes: int, repeats: int) -> None:
    """Takes turns, in alternating order. New bytes each time: content that the Hub knows is not sent again."""
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
    up: dict[str, list[float]] = {name: [] for name in contenders}
    down: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(repeats):
        for name in sorted(contenders, reverse=number % 2 == 0):
            upload, download = contenders[name]
            key = f"payload-{uuid.uuid4().hex}"
            source.write_bytes(os.urandom(nbytes))
            up[name].append(wall_seconds(lambda: upload(key)))  # noqa: B023
            down[name].append(wall_seconds(lambda: download(key)))  # noqa: B023
            copy.unlink()
    for title, seconds in (("upload", up), ("download", down)):
        ours, theirs = min(seconds["weightline"]), min(seconds["huggingface_hub"])
        print(
            f"{title:9} {nbytes / ours / 1e6:6.0f} MB/s, {theirs / ours:.2f} x huggingface_hub "
            f"({nbytes / theirs / 1e6:.0f} MB/s); best of {repeats}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=64, help="Size of the file that goes up and down.")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--settle-seconds", type=float, default=2.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="weightline-bench-") as name:
        folder = Path(name)
        with _hub(folder, options.settle_seconds) as url:
            from weightline.store.hub import open_hub  # the clients read the environment when they are imported

            for mode, has_keys in _MODES.items():
                if has_keys:
                    os.environ |= {
                        "HF_S3_ACCESS_KEY_ID": "HFAKbench", "HF_S3_SECRET_ACCESS_KEY": "bench",
                        "HF_S3_ENDPOINT": f"{url}/s3",
                    }  # fmt: skip
                store = open_hub(f"hf://buckets/{_BUCKET}/{mode}")
                store.put_if_absent("warm", b"up")
                if mode == "claims":
                    _throughput(store, url, folder, options.mib * 2**20, options.repeats)
                latency = commit_latency(store, folder, options.repeats)
                settled = f", of which {options.settle_seconds} s settling" if mode == "claims" else ""
                print(f"encoded to visible, {mode}: {latency:.2f} s{settled} ({PAYLOADS})")


if __name__ == "__main__":
    main()
