"""Arrays that pass between the process that drives an engine and the engine's workers: a file in shared memory.

Only names pass over the engine's own control channel. One machine: workers on other hosts do not see the file.

Legend: K changed elements of a tensor.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from weightline.codec.changes import whole
from weightline.dtypes import bits_dtype
from weightline.errors import ApplyError
from weightline.files import exclusive_lock
from weightline.types import BitsArray, Changes, TensorSpec

_ALIGNMENT = 64
_PREFIX, _LOCK = "weightline-exchange-", "lock"
_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - shared memory is the point; each folder in it is 0700


@contextmanager
def exchange_folder() -> Iterator[Path]:
    """A private folder, in memory where the host has a place for that. What a crash left, the next one removes."""
    parent = _SHARED_MEMORY if os.access(_SHARED_MEMORY, os.W_OK) else Path(tempfile.gettempdir())
    _remove_leftovers(parent)
    with tempfile.TemporaryDirectory(prefix=_PREFIX, dir=parent) as name:
        with exclusive_lock(Path(name) / _LOCK):
            yield Path(name)


def _remove_leftovers(parent: Path) -> None:
    """Folders of ours whose lock nobody holds: the process that held it is gone, in whatever container it was."""
    for path in parent.glob(f"{_PREFIX}*/{_LOCK}"):
        try:
            with exclusive_lock(path):
                shutil.rmtree(path.parent, ignore_errors=True)
        except OSError:
            continue  # in use, gone by now, or another user's


def allocate(path: Path, nbytes: int) -> None:
    """A file of that size, with the memory behind it: a write to a mapped page that cannot be had ends the process.

    ApplyError when the memory is not there; then nothing is left behind.
    """
    try:
        with path.open("wb") as file:
            if nbytes:
                os.posix_fallocate(file.fileno(), 0, nbytes)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise ApplyError(
            f"{path.parent} has no room for {nbytes} bytes: {error.strerror}. Give the container more shared memory "
            "(docker: --shm-size; Kubernetes: an emptyDir of medium Memory at /dev/shm)",
            path=str(path), nbytes=nbytes,
        ) from error  # fmt: skip


def write_changes(path: Path, changes: Sequence[Changes]) -> None:
    """Whole-tensor changes: a line of JSON (`num_header_bytes` first), then positions, old and new bits, aligned."""
    header: list[dict[str, object]] = []
    arrays: list[np.ndarray[tuple[int], np.dtype[Any]]] = []
    at = 0
    for one in changes:
        spec = one.segment.tensor
        entry: dict[str, object] = {"name": spec.name, "dtype": spec.dtype, "shape": spec.shape, "num": one.num_changed}
        entry["at"] = at
        columns = (one.positions_K.astype("<i8", copy=False), one.old_K, one.new_K)
        arrays += columns
        at += sum(_aligned(column.nbytes) for column in columns)
        header.append(entry)
    raw = json.dumps(header).encode()
    allocate(path, _aligned(8 + len(raw)) + at)
    with path.open("r+b") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.write(bytes(_aligned(8 + len(raw)) - 8 - len(raw)))
        for column in arrays:
            file.write(np.ascontiguousarray(column).data)
            file.write(bytes(_aligned(column.nbytes) - column.nbytes))


def read_changes_file(path: Path) -> tuple[Changes, ...]:
    """Inverse of `write_changes`: the arrays are views of the mapped file. ApplyError when it is not there."""
    try:
        raw = np.memmap(path, np.uint8, "c")
    except OSError as error:
        raise ApplyError(
            f"{path} cannot be read by an engine's worker: {error.strerror}. Workers on other hosts are not supported",
            path=str(path),
        ) from error
    header_nbytes = int.from_bytes(bytes(raw[:8]), "little")
    start = _aligned(8 + header_nbytes)
    return tuple(_one(raw, start, entry) for entry in json.loads(bytes(raw[8 : 8 + header_nbytes])))


def _one(raw: np.memmap[tuple[int], np.dtype[np.uint8]], start: int, entry: dict[str, object]) -> Changes:
    shape, num, at = entry["shape"], entry["num"], entry["at"]
    assert isinstance(shape, list)
    assert isinstance(num, int)
    assert isinstance(at, int)
    spec = TensorSpec(str(entry["name"]), str(entry["dtype"]), tuple(shape))
    columns: list[BitsArray] = []
    for dtype in (np.dtype("<i8"), bits_dtype(spec.dtype), bits_dtype(spec.dtype)):
        nbytes = num * dtype.itemsize
        columns.append(raw[start + at : start + at + nbytes].view(dtype))
        at += _aligned(nbytes)
    positions_K, old_K, new_K = columns
    return Changes(whole(spec), positions_K.view(np.int64), old_K, new_K)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
