"""Compares the stores with the plain client or a file copy in one run, and measures until a commit is visible.

python -m benchmarks.store_bench [--mib 128] [--repeats 5]

S3 and Azure are servers on this machine (moto, and azurite if it is installed), which share its cores with the clients.
So ratios carry over, megabytes per second do not. benchmarks/hub_bench.py measures the Hub.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.commit_latency import PAYLOADS, commit_latency
from benchmarks.timing import wall_seconds
from tests.store import servers
from weightline.store import Store, open_store
from weightline.store.open import check_writable


@dataclass(frozen=True, slots=True)
class Plain:
    """A plain client to compare with: durable upload of a file, download to a file."""

    name: str
    upload: Callable[[str, Path], object]
    download: Callable[[str, Path], object]


def _copy_and_sync(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)
    with target.open("rb") as file:
        os.fsync(file.fileno())


def _file_copy(folder: Path) -> Plain:
    return Plain(
        "file copy, fsync",
        lambda key, path: _copy_and_sync(path, folder / key),
        lambda key, path: shutil.copyfile(folder / key, path),
    )


def _boto3(bucket: str, port: int) -> Plain:
    import boto3

    client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}")
    return Plain(
        "boto3",
        lambda key, path: client.upload_file(str(path), bucket, key),
        lambda key, path: client.download_file(bucket, key, str(path)),
    )


def _obstore(remote: object) -> Plain:
    import obstore

    def download(key: str, path: Path) -> None:
        with path.open("wb") as file:
            for piece in obstore.get(remote, key).stream():  # type: ignore[arg-type]
                file.write(piece)

    return Plain("obstore", lambda key, path: obstore.put(remote, key, path), download)  # type: ignore[arg-type]


@contextmanager
def _local() -> Iterator[tuple[str, list[Plain]]]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        yield (folder / "bucket").as_uri(), [_file_copy(folder)]


@contextmanager
def _s3() -> Iterator[tuple[str, list[Plain]]]:
    from obstore.store import S3Store

    with servers.moto_server() as port:
        os.environ |= servers.S3_ENVIRONMENT | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}
        servers.create_s3_bucket(port, "bench")
        yield (
            "s3://bench/chain",
            [_boto3("bench", port), _obstore(S3Store("bench", client_options={"allow_http": True}))],
        )


@contextmanager
def _az() -> Iterator[tuple[str, list[Plain]]]:
    from obstore.store import AzureStore

    with servers.azurite_server() as port:
        os.environ |= servers.azure_environment(port)
        servers.create_azure_container(port, "bench")
        yield "az://bench/chain", [_obstore(AzureStore("bench", client_options={"allow_http": True}))]


def _throughput(store: Store, plains: list[Plain], source: Path, folder: Path, repeats: int) -> None:
    """Lets the clients take turns, so that other load on the machine affects all alike."""
    contenders = [Plain("weightline", store.put_file, store.get_file), *plains]
    up: dict[str, list[float]] = {one.name: [] for one in contenders}
    down: dict[str, list[float]] = {one.name: [] for one in contenders}
    for _ in range(repeats):
        for one in contenders:
            key, copy = f"payload-{uuid.uuid4().hex}", folder / "copy"
            up[one.name].append(wall_seconds(lambda: one.upload(key, source)))  # noqa: B023
            down[one.name].append(wall_seconds(lambda: one.download(key, copy)))  # noqa: B023
            copy.unlink()
    nbytes = source.stat().st_size
    for title, seconds in (("upload", up), ("download", down)):
        ours = min(seconds["weightline"])
        for plain in plains:
            theirs = min(seconds[plain.name])
            print(
                f"  {title:9} {nbytes / ours / 1e6:6.0f} MB/s, {theirs / ours:.2f} x {plain.name} "
                f"({nbytes / theirs / 1e6:.0f} MB/s)"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=128, help="Size of the file that goes up and down.")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    benches = {"local": _local, "s3": _s3} | ({"az": _az} if servers.azurite_command() else {})
    for name, bench in benches.items():
        print(f"{name}, {options.mib} MiB, best of {options.repeats}")
        with ExitStack() as stack, tempfile.TemporaryDirectory() as folder:
            url, plains = stack.enter_context(bench())
            store = open_store(url)
            check_writable(store)
            source = Path(folder) / "source"
            source.write_bytes(os.urandom(options.mib * 2**20))
            _throughput(store, plains, source, Path(folder), options.repeats)
            latency = commit_latency(store, Path(folder), options.repeats)
            print(f"  encoded to visible, {PAYLOADS}: {latency:.3f} s")


if __name__ == "__main__":
    main()
