"""Checks a bucket of yours for everything that weightline relies on: python infra/check_bucket.py URL [--mib 64].

Works below a prefix of its own, which it empties at the end. Prints one line per check, and exits with code 1 if any
check fails. docs/buckets.md lists the checks that need a real account.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from check_hub import gateway_lag, pages_of_listings
from safetensors.numpy import load_file, save_file

from weightline.chain.files.checkpoint import write_checkpoint
from weightline.chain.read.history import Chain
from weightline.chain.upkeep.verify import verify_chain
from weightline.chain.write.standalone import commit_folder
from weightline.errors import NotFoundError, ObjectExistsError, TransientStorageError, WeightlineError
from weightline.files import sha256_of
from weightline.store import ObjectInfo, Store, open_store
from weightline.store.open import check_writable
from weightline.store.retry import RetryingStore

_NUM_THREADS = 8
_NUM_RACES = 5
_NUM_LISTED = 12
_LATE_SECONDS = 30.0
_LARGE_KEY = "payloads/large"
_LOST_KEY = "lost/reply"


class UnmetError(Exception):
    """Raised by a check that fails."""


@dataclass(slots=True)
class Check:
    """Holds the bucket under test, and a folder for files."""

    store: Store
    folder: Path
    large_nbytes: int
    written: set[str] = field(default_factory=set)
    lag_seconds: float = 0.0
    """The longest time until a listing showed an object."""

    def create(self, key: str, body: bytes) -> None:
        self.written.add(key)
        self.store.put_if_absent(key, body)


def create_only_is_honored(check: Check) -> str:
    """Checks that the bucket refuses the second creation of a key."""
    check_writable(check.store)
    return f"mode {check.store.commit_mode}"


def one_of_many_wins(check: Check) -> str:
    """Checks that one of many threads that create the same key succeeds, and that the object has its bytes."""
    for race in range(_NUM_RACES):
        key, barrier = f"races/{race}", threading.Barrier(_NUM_THREADS)

        def create(racer: int, key: str = key, barrier: threading.Barrier = barrier) -> int | None:
            barrier.wait()
            try:
                check.create(key, f"racer {racer}".encode())
            except ObjectExistsError:
                return None
            return racer

        with ThreadPoolExecutor(_NUM_THREADS) as racers:
            winners = [racer for racer in racers.map(create, range(_NUM_THREADS)) if racer is not None]
        _require(len(winners) == 1, f"{len(winners)} of {_NUM_THREADS} writers succeeded in creating {key}")
        _require(check.store.get(key) == f"racer {winners[0]}".encode(), f"{key} holds another writer's bytes")
    _require(not check.store.contests(), "claims of one key contradict each other")
    return f"{_NUM_RACES} races of {_NUM_THREADS} threads"


def a_read_sees_the_write(check: Check) -> str:
    """Checks that get and head see an object right after its put returned."""
    for number in range(_NUM_LISTED):
        key, body = f"reads/{number}", uuid.uuid4().bytes
        check.create(key, body)
        _require(check.store.get(key) == body, f"get of {key} right after its put")
        info = check.store.head(key)
        _require(info is not None and info.nbytes == len(body), f"head of {key} right after its put")
    return f"{_NUM_LISTED} objects, every read saw them"


def a_listing_sees_the_write(check: Check) -> str:
    """Checks that list shows an object right after its put returned."""
    longest = 0.0
    for number in range(_NUM_LISTED):
        key = f"listed/{number:03}"
        check.create(key, b"")
        since = time.monotonic()
        if key not in [info.key for info in check.store.list("listed/")]:
            _listed(check, "listed/", {key})
            longest = max(longest, time.monotonic() - since)
    check.lag_seconds = longest
    _require(longest == 0, f"listed up to {longest:.1f} s late: readers lag, and a commit right after another fails")
    return f"{_NUM_LISTED} objects, every listing showed them"


def listings_are_in_order(check: Check) -> str:
    """Checks that listings are in byte order of the keys and start after a given key."""
    created = {"order/b", "order/a/2", "order/a-1", "order/a/10", "order/B"}
    for key in created:
        check.create(key, b"")
    keys = [info.key for info in _listed(check, "order/", created)]
    _require(keys == sorted(keys) and len(keys) == 5, f"listed as {keys}")
    after = [info.key for info in check.store.list("order/", "order/a/10")]
    _require(after == ["order/a/2", "order/b"], f"after order/a/10 come {after}")
    return "by bytes, from any start"


def large_files_arrive(check: Check) -> str:
    """Checks that a large file, uploaded in parts and downloaded in ranges, keeps its bytes."""
    source, copy = check.folder / "large", check.folder / "copy"
    with source.open("wb") as file:
        for _ in range(check.large_nbytes // 2**20):
            file.write(os.urandom(2**20))
    check.written.add(_LARGE_KEY)
    begun = time.monotonic()
    check.store.put_file(_LARGE_KEY, source)
    uploaded = time.monotonic()
    check.store.get_file(_LARGE_KEY, copy)
    downloaded = time.monotonic()
    _require(sha256_of(source) == sha256_of(copy), "the copy has other bytes")
    up, down = (check.large_nbytes / 1e6 / seconds for seconds in (uploaded - begun, downloaded - uploaded))
    return f"{check.large_nbytes // 2**20} MiB, sha256 equal, {up:.0f} MB/s up, {down:.0f} MB/s down"


def a_lost_reply_is_no_conflict(check: Check) -> str:
    """Checks that a writer whose put took effect without a reply recognizes its own bytes when it repeats the put."""
    inner = check.store.inner if isinstance(check.store, RetryingStore) else check.store
    check.written.add(_LOST_KEY)
    RetryingStore(_LosesReply(inner), pause_seconds=0.05).put_if_absent(_LOST_KEY, b"mine")
    _require(check.store.get(_LOST_KEY) == b"mine", "the object has other bytes")
    return "read back and recognized"


def the_clock_goes_forward(check: Check) -> str:
    """Checks that objects created one after the other have rising times: claims and gc depend on the bucket's clock."""
    keys = [f"clock/{number}" for number in range(_NUM_LISTED)]
    for key in keys:
        check.create(key, b"")
    now = time.time()
    found = {info.key: info.modified_at for info in _listed(check, "clock/", set(keys))}
    times = [found[key] for key in keys]
    _require(times == sorted(times), f"times go back: {[f'{at:%H:%M:%S.%f}' for at in times]}")
    skew = times[-1].timestamp() - now
    return f"{_NUM_LISTED} objects in order; {abs(skew):.1f} s {'ahead of' if skew > 0 else 'behind'} this host"


def a_chain_goes_there_and_back(check: Check) -> str:
    """Commits, pulls and verifies two checkpoints."""
    chain = Chain(check.store)
    folders = [_checkpoint(check.folder / f"checkpoint-{seed}", seed) for seed in range(2)]
    for folder in folders:
        commit_folder(chain, folder)
    for version, folder in enumerate(folders):
        out = check.folder / f"version-{version}"
        write_checkpoint(Chain(check.store), version, out)
        have, want = (load_file(path / "model.safetensors") for path in (out, folder))
        _require(all(np.array_equal(have[name], want[name]) for name in want), f"version {version} has other bits")
    report = verify_chain(Chain(check.store))
    _require(report.holds, "; ".join(f"{f.rule}: {f.subject}: {f.message}" for f in report.findings))
    return f"{report.num_versions} versions, bit for bit"


def all_of_it_can_be_removed(check: Check) -> str:
    """Deletes everything, including keys that are gone, and checks that nothing is left.

    A bucket that lists objects late is given the same time to show deletions.
    """
    removed: set[str] = set()
    time.sleep(2 * check.lag_seconds)
    begun = time.monotonic()
    keys = {info.key for info in check.store.list("")} | check.written
    while keys:
        _require(time.monotonic() - begun < _LATE_SECONDS or not keys & removed, f"still listed: {sorted(keys)[:3]}")
        for key in keys:
            check.store.delete(key)
        removed |= keys
        time.sleep(check.lag_seconds)
        keys = {info.key for info in check.store.list("")}
    check.store.delete(_LARGE_KEY)
    try:
        check.store.get(_LARGE_KEY)
    except NotFoundError:
        return f"{len(removed)} objects"
    raise UnmetError("a deleted object can still be read")


def _listed(check: Check, prefix: str, wanted: set[str]) -> list[ObjectInfo]:
    """Returns the first listing that shows all wanted keys. UnmetError if none does in time."""
    begun = time.monotonic()
    while True:
        infos = list(check.store.list(prefix))
        if wanted <= {info.key for info in infos}:
            return infos
        late = time.monotonic() - begun
        _require(late < _LATE_SECONDS, f"{len(wanted)} objects below {prefix} are not all listed after {late:.0f} s")
        time.sleep(0.1)


def hub_gateway_shows(check: Check) -> str:
    """Checks that the Hub's API shows objects that its S3 gateway accepted."""
    return gateway_lag(check.store.url)


def hub_lists_pages(check: Check) -> str:
    """Checks listings of more files than a page of the Hub's listings holds."""
    return pages_of_listings(check.store.url)


POINTS: tuple[tuple[str, Callable[[Check], str]], ...] = (
    ("create-only is honored", create_only_is_honored),
    ("one of many writers wins", one_of_many_wins),
    ("a read sees the write before it", a_read_sees_the_write),
    ("a listing sees the write before it", a_listing_sees_the_write),
    ("listings are in key order", listings_are_in_order),
    ("large files arrive whole", large_files_arrive),
    ("a lost reply is no conflict", a_lost_reply_is_no_conflict),
    ("the bucket's clock goes forward", the_clock_goes_forward),
    ("a chain is committed and pulled", a_chain_goes_there_and_back),
)
#: Further checks of a Hub bucket.
HUB_POINTS: tuple[tuple[str, Callable[[Check], str]], ...] = (
    ("the gateway's files show in the API", hub_gateway_shows),
    ("listings of several pages are whole", hub_lists_pages),
)


class _LosesReply:
    """Wraps a store. The first creation of one key takes effect and then raises as if its reply was lost."""

    def __init__(self, inner: Store) -> None:
        self._inner = inner
        self._is_lost = False

    def __getattr__(self, name: str) -> object:
        return getattr(self._inner, name)

    def put_if_absent(self, key: str, body: bytes) -> None:
        self._inner.put_if_absent(key, body)
        if key == _LOST_KEY and not self._is_lost:
            self._is_lost = True
            raise TransientStorageError("the reply was lost, as planned", key=key)


def _checkpoint(folder: Path, seed: int) -> Path:
    folder.mkdir()
    random = np.random.default_rng(seed)
    save_file({"weight": random.integers(0, 2**16, (64, 16), np.uint16)}, folder / "model.safetensors")
    return folder


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise UnmetError(otherwise)


def run(url: str, large_nbytes: int) -> bool:
    """Runs every check and prints a line for each. Returns whether all passed. Always removes what it wrote."""
    with tempfile.TemporaryDirectory(prefix="weightline-check-") as name:
        check = Check(open_store(f"{url.rstrip('/')}/check-{uuid.uuid4().hex[:12]}"), Path(name), large_nbytes)
        print(check.store.url)
        points = (*POINTS, *(HUB_POINTS if check.store.url.startswith("hf:") else ()))
        try:
            held = [_holds(check, title, confirm) for title, confirm in points]
        finally:
            is_empty = _holds(check, "all of it can be removed", all_of_it_can_be_removed)
    return is_empty and all(held)


def _holds(check: Check, title: str, confirm: Callable[[Check], str]) -> bool:
    begun = time.monotonic()
    try:
        said, holds = confirm(check), True
    except (WeightlineError, UnmetError) as error:
        said, holds = str(error), False
    print(f"{'ok   ' if holds else 'FAIL '} {title}: {said} ({time.monotonic() - begun:.1f} s)", flush=True)
    return holds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="A bucket of yours, or a prefix in it.")
    parser.add_argument("--mib", type=int, default=64, help="Size of the large file.")
    options = parser.parse_args()
    try:
        holds = run(options.url, options.mib * 2**20)
    except WeightlineError as error:
        sys.exit(f"error ({error.kind}): {error}")
    sys.exit(0 if holds else 1)


if __name__ == "__main__":
    main()
