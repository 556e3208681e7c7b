"""The protocol between the process that drives a vLLM and its workers: requests, answers, and files in shared memory.

Requests and answers are JSON strings, the only type that all forms of vLLM's control channel carry. Arrays are too
large for it, so they pass through a file in shared memory, whose path is in the request. Driver and workers therefore
run on one machine.

Legend: K changed elements of a tensor.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from weightline.dtypes import bits_dtype
from weightline.errors import ApplyError, WeightlineError
from weightline.files import exclusive_lock
from weightline.serving.http.errors import error_body, error_of
from weightline.types import BitsArray, Changes, TensorSpec, whole

WORKER_EXTENSION = "weightline.serving.engines.vllm.worker.WeightlineWorker"

_ALIGNMENT = 64
_PREFIX, _LOCK = "weightline-exchange-", "lock"
_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - shared memory is the point; each folder in it is 0700


def answer_of(work: Callable[[], Any]) -> str:
    """Returns a worker's answer: the JSON of the result, or of the error, since types do not survive the channel."""
    try:
        return json.dumps({"result": work()})
    except WeightlineError as error:
        return json.dumps(error_body(str(error), str(error.kind), error.facts))


def results_of(answers: Sequence[str]) -> list[Any]:
    """Returns every worker's result, by rank. Raises the first error among the answers, as its own type."""
    bodies = [json.loads(answer) for answer in answers]
    for body in bodies:
        if "error" in body:
            raise error_of(body, "a vLLM worker failed")
    return [body["result"] for body in bodies]


def specs_to_json(specs: Mapping[str, TensorSpec]) -> list[object]:
    """Returns the tensors as lists of name, dtype and shape."""
    return [(spec.name, spec.dtype, spec.shape) for spec in specs.values()]


def specs_from_json(raw: Sequence[Any]) -> dict[str, TensorSpec]:
    """Inverts `specs_to_json`."""
    return {name: TensorSpec(name, dtype, tuple(shape)) for name, dtype, shape in raw}


@contextmanager
def exchange_folder() -> Iterator[Path]:
    """Yields a private folder, in shared memory if the host has it. Removes those that killed processes left."""
    parent = _SHARED_MEMORY if os.access(_SHARED_MEMORY, os.W_OK) else Path(tempfile.gettempdir())
    _remove_leftovers(parent)
    with tempfile.TemporaryDirectory(prefix=_PREFIX, dir=parent) as name:
        with exclusive_lock(Path(name) / _LOCK):
            yield Path(name)


def _remove_leftovers(parent: Path) -> None:
    """Removes exchange folders whose lock is free, since the process that held it is gone. Works across containers."""
    for path in parent.glob(f"{_PREFIX}*/{_LOCK}"):
        try:
            with exclusive_lock(path):
                shutil.rmtree(path.parent, ignore_errors=True)
        except OSError:
            continue  # in use, gone by now, or another user's


def allocate(path: Path, nbytes: int) -> None:
    """Creates a file of that size and reserves its memory: a write to a mapped page without memory ends the process.

    ApplyError when there is not enough memory; then no file is left.
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
    """Writes whole-tensor changes: 8 bytes with the header's size, the header as JSON, then positions, old, new bits.

    Every array starts at a multiple of 64 bytes.
    """
    header: list[dict[str, object]] = []
    arrays: list[np.ndarray[tuple[int], np.dtype[Any]]] = []
    at = 0
    for one in changes:
        spec = one.segment.tensor
        header.append(
            {"name": spec.name, "dtype": spec.dtype, "shape": spec.shape, "num_changed": one.num_changed, "at": at}
        )
        columns = (one.positions_K.astype("<i8", copy=False), one.old_K, one.new_K)
        arrays += columns
        at += sum(_aligned(column.nbytes) for column in columns)
    raw = json.dumps(header).encode()
    allocate(path, _aligned(8 + len(raw)) + at)
    with path.open("r+b") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.write(bytes(_aligned(8 + len(raw)) - 8 - len(raw)))
        for column in arrays:
            file.write(np.ascontiguousarray(column).data)
            file.write(bytes(_aligned(column.nbytes) - column.nbytes))


def read_changes_file(path: Path) -> tuple[Changes, ...]:
    """Inverts `write_changes`. The arrays are views of the mapped file. ApplyError when the file cannot be read."""
    try:
        raw = np.memmap(path, np.uint8, "c")
    except OSError as error:
        raise ApplyError(
            f"{path} cannot be read by an engine's worker: {error.strerror}. Workers on other hosts are not supported",
            path=str(path),
        ) from error
    header_nbytes = int.from_bytes(bytes(raw[:8]), "little")
    start = _aligned(8 + header_nbytes)
    return tuple(_one(raw, start, **entry) for entry in json.loads(bytes(raw[8 : 8 + header_nbytes])))


def _one(
    raw: np.memmap[tuple[int], np.dtype[np.uint8]],
    start: int,
    *,
    name: str,
    dtype: str,
    shape: Sequence[int],
    num_changed: int,
    at: int,
) -> Changes:
    spec = TensorSpec(name, dtype, tuple(shape))
    columns: list[BitsArray] = []
    for column_dtype in (np.dtype("<i8"), bits_dtype(dtype), bits_dtype(dtype)):
        nbytes = num_changed * column_dtype.itemsize
        columns.append(raw[start + at : start + at + nbytes].view(column_dtype))
        at += _aligned(nbytes)
    positions_K, old_K, new_K = columns
    return Changes(whole(spec), positions_K.view(np.int64), old_K, new_K)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
