"""Publishes a chain for SGLang's `/pull_weights`: one folder `weight_v{N:06d}` per version, on a shared file system.

Layout as in sgl-project/sglang `srt/weight_sync/local_checkpoint.py` (and slime's disk deltas): version 0 is the
engine's own model path; a full version is a plain checkpoint folder; a delta is a folder of safetensors files that
hold, by tensor name, the zstd-compressed XOR of all bytes of the tensor before and after, with adler32 checksums of the
new bytes as file metadata, and an index that names the version and its base. `/update_weights_from_disk` reads full
versions directly.

A reader begins at the newest full version and patches it with the deltas after it. A version is published in full when
a delta cannot express it: its tensors or small files differ from those of the version before, or that one is gone.
SGLang does not check the bits of its base and can go back only to a full version, so the chain's guarantees end at this
folder. Every version is read from the chain with its digests checked.

Legend: N elements of a tensor.
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import safetensors
import zstandard

from weightline.chain import Chain
from weightline.chain.files.assets import assets_of
from weightline.chain.files.checkpoint import write_checkpoint
from weightline.chain.files.meaning import have_same_meaning
from weightline.chain.replay.diff import tensor_groups
from weightline.chain.replay.fetch import Fetcher, fetching
from weightline.chain.replay.state import HostState, read_state
from weightline.errors import WeightlineError
from weightline.format.keys import checked_name
from weightline.serving.http.server import own_folder
from weightline.serving.replica.following import Following
from weightline.serving.replica.registration import Presence, Registration
from weightline.serving.replica.status import ReplicaStatus, error_text

INDEX = "model.safetensors.index.json"
_FOLDER = "weight_v"
_LEVEL = 1


def version_folder(source_dir: Path, version: int) -> Path:
    """Returns the folder of a published version."""
    return source_dir / f"{_FOLDER}{version:06d}"


def publish_version(chain: Chain, version: int, source_dir: Path, *, is_full: bool = False) -> Path:
    """Publishes one version: as a delta to the published version before it if possible, else in full.

    Returns its folder, which appears complete, by one rename; a crash leaves a folder whose name begins with a dot.
    Safe to repeat: an existing folder stays. VersionNotFoundError for an unknown version.
    """
    folder = version_folder(source_dir, version)
    if folder.exists():
        return folder
    chain.header(version)
    source_dir.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=source_dir))
    is_published = False
    try:
        if is_full or not _can_be_patched(chain, version - 1, version, source_dir):
            write_checkpoint(chain, version, draft)
        else:
            _write_delta(chain, version, draft)
        draft.chmod(0o755)
        draft.rename(folder)
        is_published = True
    finally:
        if not is_published:
            shutil.rmtree(draft, ignore_errors=True)
    return folder


def publish_up_to(chain: Chain, version: int, source_dir: Path, *, is_full: bool = False) -> Iterator[Path]:
    """Publishes the chain's versions after the newest published one, up to `version`. Yields every new folder.

    After versions that are missing in the chain, the next one is published in full: a reader starts again from there.
    Safe to repeat.
    """
    chain.header(version)
    newest = newest_published(source_dir)
    for number in chain.versions(0 if newest is None else newest + 1, version):
        yield publish_version(chain, number, source_dir, is_full=is_full)


def newest_published(source_dir: Path) -> int | None:
    """Returns the newest version that has a folder; None when there is none."""
    numbers = (path.name.removeprefix(_FOLDER) for path in source_dir.glob(f"{_FOLDER}*"))
    return max((int(number) for number in numbers if number.isdecimal()), default=None)


def _can_be_patched(chain: Chain, base: int, version: int, source_dir: Path) -> bool:
    """Returns whether the base is published and has the same tensors and small files as the version."""
    if not version_folder(source_dir, base).exists() or not chain.versions(base, base):
        return False
    has_same_tensors = chain.layout(base) == chain.layout(version)
    return has_same_tensors and have_same_meaning(chain.store, assets_of(chain, base), assets_of(chain, version))


def _write_delta(chain: Chain, version: int, folder: Path) -> None:
    weight_map: dict[str, str] = {}
    with fetching(chain.store) as fetcher:
        groups = tensor_groups(chain.layout(version).specs)
        for number, names in enumerate(groups):
            differences, checksums = _differences(chain, version, names, fetcher)
            if not differences:
                continue
            file_name = f"model-{number:05d}.safetensors"
            _write_file(folder / file_name, differences, checksums)
            weight_map |= dict.fromkeys(differences, file_name)
    metadata = {
        "version": f"{version:06d}",
        "base_version": f"{version - 1:06d}",
        "delta_encoding": "xor",
        "compression_format": "zstd",
        "checksum_format": "adler32",
    }
    (folder / INDEX).write_text(json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=1))


def _differences(
    chain: Chain, version: int, names: frozenset[str], fetcher: Fetcher
) -> tuple[dict[str, bytes], dict[str, str]]:
    """Returns (compressed XOR, checksum of the new bytes), each by name, of the tensors of a group that differ."""
    old = read_state(chain, version - 1, names.__contains__, fetcher)
    new = read_state(chain, version, names.__contains__, fetcher)
    differences: dict[str, bytes] = {}
    checksums: dict[str, str] = {}
    for name, difference_N in _xor(old, new):
        differences[name] = zstandard.ZstdCompressor(_LEVEL).compress(difference_N.tobytes())
        checksums[name] = f"{zlib.adler32(new.bits[name].tobytes()):08x}"
    return differences, checksums


def _xor(old: HostState, new: HostState) -> Iterator[tuple[str, np.ndarray[tuple[int], np.dtype[np.uint8]]]]:
    for name, bits_N in new.bits.items():
        if old.digests[name] != new.digests[name]:
            yield name, np.bitwise_xor(old.bits[name].view(np.uint8), bits_N.view(np.uint8))


def _write_file(path: Path, differences: dict[str, bytes], checksums: dict[str, str]) -> None:
    held = {name: np.frombuffer(raw, np.uint8) for name, raw in differences.items()}
    tensors = {
        name: safetensors.TensorSpec(dtype="uint8", shape=(raw.size,), data_ptr=raw.ctypes.data, data_len=raw.nbytes)
        for name, raw in held.items()
    }
    safetensors.serialize_file(tensors, str(path), checksums)


_log = logging.getLogger(__name__)
#: Name of the folder, below the published one, that holds the publisher's lock and the id of its lease.
STATE_FOLDER = ".publisher"


class Publisher:
    """Publishes a chain to one folder. Calls `on_published` with every new folder."""

    def __init__(
        self,
        chain: Chain,
        source_dir: Path,
        name: str,
        on_published: Callable[[Path], object],
        *,
        is_full: bool = False,
    ) -> None:
        self._chain, self._source_dir, self._is_full = chain, source_dir, is_full
        self._on_published = on_published
        self._name = checked_name(name)
        self._last_error: Exception | None = None

    def run(self, following: Following | None) -> None:
        """Publishes all versions up to the tip. With `following` it repeats this forever, and logs errors.

        InputError when another publisher uses the folder or the name. Without `following` any error is raised.
        """
        state_dir = self._source_dir / STATE_FOLDER
        with own_folder(state_dir), self._registered(state_dir) as registration:
            num_failures = 0
            while True:
                num_failures = 0 if self._publish(registration, raises=following is None) else num_failures + 1
                if following is None:
                    return
                time.sleep(following.wait_seconds(num_failures))

    def status(self) -> ReplicaStatus:
        """Returns the status for the lease, by which garbage collection keeps the newest published version."""
        version = newest_published(self._source_dir)
        return ReplicaStatus(
            replica=self._name,
            chain=self._chain.url,
            engine="sglang-files",
            state="waiting" if version is None else "serving",
            version=version,
            commit_id=None,
            served_at=None,
            last_error=None if self._last_error is None else error_text(self._last_error),
        )

    def _publish(self, registration: Registration, *, raises: bool) -> bool:
        """Publishes all versions up to the tip. Returns False after an error that was logged."""
        try:
            self._publish_all(registration)
        except WeightlineError as error:
            if raises:
                raise
            _log.warning("publishing to %s failed: %s", self._source_dir, error)
            self._last_error = error
        except Exception as error:
            if raises:
                raise
            # It lives as long as the process: a full disk, or a fault of our own, is tried again.
            _log.exception("publishing to %s failed", self._source_dir)
            self._last_error = error
        else:
            self._last_error = None
            return True
        return False

    def _publish_all(self, registration: Registration) -> None:
        tip = self._chain.tip_version()
        if tip is None or tip == newest_published(self._source_dir):
            return
        with registration.moving(tip):
            for folder in publish_up_to(self._chain, tip, self._source_dir, is_full=self._is_full):
                self._on_published(folder)

    @contextmanager
    def _registered(self, state_dir: Path) -> Iterator[Registration]:
        """Holds the lease during the block. A thread renews it."""
        registration = Registration(self._chain, state_dir, Presence(), self.status)
        registration.claim()
        is_over = threading.Event()
        renewing = threading.Thread(
            target=registration.renew_until, args=(is_over,), name="weightline-lease", daemon=True
        )
        renewing.start()
        try:
            yield registration
        finally:
            is_over.set()
            registration.wake()
            renewing.join()
            registration.end()
