"""One worker's weights: stages changes for its memory, writes them in a pause, and reads them back.

All possible work is done before the pause: staging computes the address of each changed element in this worker and
checks that the memory holds the old bits. Writing is one loop of scattered stores per box, which also reads the
elements back. The digest of a write is that of the staged changes, since the read back proves that they are in memory.

This module does not import vLLM. numba is imported on first use: when vLLM starts a worker in this process, it walks
over all modules and fails at one of numba's.

Legend: N elements of a tensor or of a storage, K changed ones, here: of one box.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from weightline.chain.replay.state import OverlaidState, ReadSegment
from weightline.codec.coding import ordered_map
from weightline.codec.digest import add_digests, digest_change, tensor_digest
from weightline.codec.torch_ops import signed_tensor
from weightline.dtypes import bits_dtype
from weightline.errors import ApplyError, BaseMismatchError, DigestMismatchError
from weightline.format.payload import open_payload
from weightline.serving.engines.vllm.mapping import Assignment, PlacedBox, Placement, learn_placement
from weightline.serving.engines.vllm.wire import answer_of, read_changes_file
from weightline.types import BitsArray, Changes, Segment, TensorSpec


def _host_cpus() -> frozenset[int]:
    """Returns the CPUs of this process and its parent, since vLLM pins its workers before it imports this module."""
    if not hasattr(os, "sched_getaffinity"):
        return frozenset()
    return frozenset(os.sched_getaffinity(0) | os.sched_getaffinity(os.getppid()))


_CPUS = _host_cpus()


def _use_all_cpus() -> None:
    """Lets the calling thread run on all CPUs that the process had when it started. Cheap; safe to repeat."""
    if _CPUS:
        os.sched_setaffinity(0, _CPUS)


class WorkerWeights:
    """One worker's part of the model, with the methods that the driver calls. Only `write` changes weights."""

    def __init__(self, model: torch.nn.Module, rank: int = 0) -> None:
        self._model, self._rank = model, rank
        self._specs: dict[str, TensorSpec] = {}
        self._placement: Placement = {}
        self._assignment: Assignment = {}
        self._staged: StagedChanges | None = None
        self._decoded: DecodedChanges | None = None
        self._background = ThreadPoolExecutor(1, "weightline", initializer=_use_all_cpus)
        self._job: Future[Any] | None = None

    def learn(self, specs: Mapping[str, TensorSpec]) -> dict[str, Any]:
        """Maps the tensors and returns the boxes of each. ApplyError when the model cannot be refreshed in place."""
        self._staged, self._decoded, self._assignment, self._specs = None, None, {}, dict(specs)
        self._placement = learn_placement(self._model, specs)
        boxes = {name: [placed.box.to_json() for placed in held] for name, held in self._placement.items()}
        return {"boxes": boxes}

    def call(self, request: str) -> str:
        """Runs a request of the driver and returns its JSON answer.

        A request is {"method", "arguments", "is_background"}. A background request returns at once and does not block
        the engine's loop; `poll` returns {"is_done"} and, once it is done, its {"result"}. One runs at a time.
        """
        return answer_of(lambda: self._run(**json.loads(request)))

    def _run(self, method: str, arguments: dict[str, Any], *, is_background: bool = False) -> Any:
        if method not in _METHODS:
            raise ApplyError(f"a worker has no method {method!r}")
        work = getattr(self, method)
        if not is_background:
            return work(**arguments)
        if self._job is not None and not self._job.done():
            raise ApplyError("another background request runs in this worker")
        self._job = self._background.submit(work, **arguments)
        return {}

    def poll(self) -> dict[str, Any]:
        """Returns whether the background request is done, with its result. Raises the error of the request."""
        if self._job is None:
            raise ApplyError("no background request was started in this worker")
        return {"is_done": True, "result": self._job.result()} if self._job.done() else {"is_done": False}

    def assign(self, assignments: Sequence[Assignment]) -> dict[str, Any]:
        """Stores this worker's part of all ranks' assignments."""
        self._assignment = assignments[self._rank]
        return {}

    def read_digests(self, names: Sequence[str]) -> dict[str, Any]:
        """Returns, by tensor, the digest of each of its boxes. Equal boxes must have equal digests on all workers."""
        specs = {name: self._spec(name) for name in names}
        digests = {name: [_box_digest(one, spec) for one in self._placement[name]] for name, spec in specs.items()}
        return {"digests": digests}

    def read_bits(self, name: str, path: str) -> dict[str, Any]:
        """Writes the boxes assigned to this worker to their positions in a file that holds the whole tensor."""
        spec = self._spec(name)
        try:
            bits_N = np.memmap(path, bits_dtype(spec.dtype), "r+", shape=(spec.num_elements,))
        except OSError as error:
            raise ApplyError(f"{path} cannot be written by an engine's worker: {error.strerror}", path=path) from error
        self._gather(spec, bits_N)
        return {}

    def decode(self, ticket: int, step: int, paths: Sequence[str], *, is_backward: bool) -> dict[str, Any]:
        """Decodes the payloads of one step on top of the steps before under the same ticket. Writes no weights.

        Keeps the changes of the tensors that this worker holds, for `stage_decoded`. Returns, by tensor, this step's
        changes of the digests, and how many elements now differ from the memory. Drops what was staged or kept before.
        """
        decoded, self._staged, self._decoded = self._decoded, None, None
        if step == 0:
            specs = {name: spec for name, spec in self._specs.items() if self._placement[name]}
            decoded = DecodedChanges(ticket, specs, self._segment_bits)
        if decoded is None or (decoded.ticket, decoded.num_steps) != (ticket, step):
            raise ApplyError("the worker does not keep the changes that this step is to follow: prepare it again")
        digests = decoded.apply([Path(path) for path in paths], self._specs, is_backward=is_backward)
        self._decoded = decoded
        return {"digests": digests, "num_changed": decoded.state.num_changed}

    def stage_decoded(self, ticket: int) -> dict[str, Any]:
        """Prepares the changes that `decode` kept. Writes no weights. BaseMismatchError as `stage` raises it."""
        decoded, self._staged, self._decoded = self._decoded, None, None
        if decoded is None or decoded.ticket != ticket:
            raise ApplyError("the worker does not keep the changes that are to be staged: prepare them again")
        return self._stage(decoded.state.changes.values())

    def stage(self, path: str) -> dict[str, Any]:
        """Prepares a file's changes. Writes no weights. BaseMismatchError when the memory lacks the old bits."""
        self._staged = self._decoded = None
        return self._stage(map(_copied, read_changes_file(Path(path))))

    def _stage(self, changes: Iterable[Changes]) -> dict[str, Any]:
        staged = stage(self._placement, self._assignment, changes, num_threads=max(1, len(_CPUS)))
        staged.check_base()
        self._staged = staged
        return {"num_elements": staged.num_elements}

    def write(self, *, is_undo: bool) -> dict[str, Any]:
        """Writes the new (undo: the old) bits of the staged changes and reads them back.

        Returns their change of the state's digests, by tensor. DigestMismatchError when the memory does not hold the
        written bits. After an error any part may be written.
        """
        if self._staged is None:
            raise ApplyError("nothing is staged")
        self._staged.write(is_undo=is_undo)
        return {"digests": self._staged.digests}

    def unstage(self) -> dict[str, Any]:
        """Drops the staged and the decoded changes, which frees their memory. Safe to repeat."""
        self._staged = self._decoded = None
        return {}

    def _segment_bits(self, segment: Segment) -> BitsArray:
        """Returns the bits of a part of a tensor that this worker holds: a view on a CPU if they lie in order."""
        spec = segment.tensor
        for placed in self._placement[spec.name]:
            if placed.is_whole(spec):
                return _host_bits(placed.flat[placed.offset :][segment.start : segment.stop], spec)
        bits_N = np.empty(spec.num_elements, bits_dtype(spec.dtype))
        self._gather(spec, bits_N)
        return bits_N[segment.start : segment.stop]

    def _gather(self, spec: TensorSpec, bits_N: BitsArray) -> None:
        """Copies the boxes that are assigned to this worker to their positions in the whole tensor."""
        for number in self._assignment.get(spec.name, ()):
            placed = self._placement[spec.name][number]
            placed.box.within(bits_N)[...] = _box_bits(placed, spec).reshape(placed.box.shape)

    def _spec(self, name: str) -> TensorSpec:
        if name not in self._specs:
            raise ApplyError(f"the engine's parameters were not mapped for {name}: load the version", tensor=name)
        return self._specs[name]


_METHODS = frozenset(
    {"assign", "poll", "read_digests", "read_bits", "decode", "stage", "stage_decoded", "write", "unstage"}
)


class DecodedChanges:
    """Changes that a worker decoded against its own memory, in steps, and keeps until they are staged."""

    def __init__(self, ticket: int, specs: Mapping[str, TensorSpec], read_segment: ReadSegment) -> None:
        self.ticket, self.num_steps = ticket, 0
        self.state = OverlaidState(0, dict(specs), dict.fromkeys(specs, 0), read_segment)

    def apply(self, paths: Sequence[Path], specs: Mapping[str, TensorSpec], *, is_backward: bool) -> dict[str, int]:
        """Decodes one more step. Returns its changes of the digests, by tensor. After an error it cannot go on."""
        try:
            payloads = [open_payload(path) for path in paths]
        except OSError as error:
            raise ApplyError(
                f"a payload cannot be read by an engine's worker: {error}. Workers on other hosts are not supported"
            ) from error
        self.state.digests = dict.fromkeys(self.state.specs, 0)
        self.state.apply_payloads(payloads, specs, is_backward=is_backward)
        self.num_steps += 1
        return {name: digest for name, digest in self.state.digests.items() if digest}


@dataclass(frozen=True, slots=True, eq=False)
class BoxChanges:
    """The changes of one tensor in one box: at `at_K` of its flat memory, `old_K` become `new_K`. Bits are signed."""

    name: str
    flat: torch.Tensor
    at_K: torch.Tensor
    old_K: torch.Tensor
    new_K: torch.Tensor


@dataclass(frozen=True, slots=True, eq=False)
class StagedChanges:
    """One worker's part of a set of changes. `digests`: the change of digest of the assigned boxes, by tensor."""

    boxes: tuple[BoxChanges, ...]
    digests: dict[str, int]
    num_elements: int

    def check_base(self) -> None:
        """Raises BaseMismatchError, naming a tensor, unless every element here holds the old bits."""
        name = _first_failing(self.boxes, lambda one: _holds(one.flat, one.at_K, one.old_K), max(1, len(_CPUS)))
        if name is not None:
            raise BaseMismatchError(
                f"the engine's {name} does not hold the bits that the changes start from", tensor=name
            )

    def write(self, *, is_undo: bool) -> None:
        """Writes the new (undo: the old) bits and reads them back. After an error any part may be written.

        DigestMismatchError, naming a tensor, when the memory does not hold the written bits. Uses all CPUs, also those
        that the engine computes with, since the engine is idle in a pause.
        """
        name = _first_failing(self.boxes, lambda one: write_box(one, is_undo=is_undo), max(1, len(_CPUS)))
        if name is not None:
            raise DigestMismatchError(f"{name} did not take the bits that were written", what=name)


def stage(
    placement: Placement, assignment: Assignment, changes: Iterable[Changes], *, num_threads: int = 1
) -> StagedChanges:
    """Computes the addresses of the changed elements. Reads and writes no weights. ApplyError for unknown tensors.

    The result may hold views of the changes' arrays.
    """
    boxes: list[BoxChanges] = []
    digests: dict[str, int] = {}
    num_elements = 0
    work = partial(_stage_tensor, placement, assignment)
    for found, name, digest, num in ordered_map(work, changes, num_threads):
        boxes += found
        num_elements += num
        if num:
            digests[name] = digest
    return StagedChanges(tuple(boxes), digests, num_elements)


def _stage_tensor(
    placement: Placement, assignment: Assignment, changes: Changes
) -> tuple[list[BoxChanges], str, int, int]:
    """Returns (changes in each box, tensor's name, digest change of its assigned boxes, their changed elements)."""
    spec = changes.segment.tensor
    name = spec.name
    if name not in placement:
        raise ApplyError(f"the engine's parameters were not mapped for {name}: load the version", tensor=name)
    boxes: list[BoxChanges] = []
    digest = num_elements = 0
    positions_K = torch.from_numpy(changes.positions_K)
    for number, placed in enumerate(placement[name]):
        if placed.is_whole(spec):
            held, at_K = changes, positions_K + placed.offset if placed.offset else positions_K
        else:
            found_K, at_K = placed.locate(positions_K)
            held = changes if bool(found_K.all()) else _part(changes, found_K.numpy())
        if not held.num_changed:
            continue
        device = placed.flat.device
        old_K, new_K = (signed_tensor(bits_K).to(device) for bits_K in (held.old_K, held.new_K))
        boxes.append(BoxChanges(name, placed.flat, at_K.to(device), old_K, new_K))
        if number in assignment.get(name, ()):
            digest = add_digests(digest, digest_change(held))
            num_elements += held.num_changed
    return boxes, name, digest, num_elements


def write_box(one: BoxChanges, *, is_undo: bool) -> bool:
    """Writes the new (undo: the old) bits of one box; returns whether the memory then holds them.

    `at_K` lies within the memory, which was checked when the mapping was made, and names no element twice.
    """
    bits_K = one.old_K if is_undo else one.new_K
    if one.flat.device.type != "cpu":
        one.flat.index_copy_(0, one.at_K, bits_K)
        return torch.equal(one.flat.index_select(0, one.at_K), bits_K)
    from weightline.codec.kernels import elements

    return int(elements.write_and_count_differing(one.flat.numpy(), one.at_K.numpy(), bits_K.numpy())) == 0


def _holds(flat_N: torch.Tensor, at_K: torch.Tensor, bits_K: torch.Tensor) -> bool:
    if flat_N.device.type != "cpu":
        return torch.equal(flat_N.index_select(0, at_K), bits_K)
    from weightline.codec.kernels import elements

    return int(elements.count_differing(flat_N.numpy(), at_K.numpy(), bits_K.numpy())) == 0


def _part(changes: Changes, mask_K: npt.NDArray[np.bool_]) -> Changes:
    return Changes(changes.segment, changes.positions_K[mask_K], changes.old_K[mask_K], changes.new_K[mask_K])


def _copied(changes: Changes) -> Changes:
    """Returns changes with arrays of their own, since the shared file that they are read from is removed."""
    return Changes(changes.segment, changes.positions_K.copy(), changes.old_K.copy(), changes.new_K.copy())


def _first_failing(boxes: Sequence[BoxChanges], check: Callable[[BoxChanges], bool], num_threads: int) -> str | None:
    """Returns the tensor of a box for which the check fails; None when all pass. One thread per share of the boxes."""

    def first_of(share: Sequence[BoxChanges]) -> str | None:
        _use_all_cpus()
        return next((one.name for one in share if not check(one)), None)

    found = ordered_map(first_of, _shares(boxes, num_threads), num_threads)
    return next((name for name in found if name is not None), None)


def _shares(boxes: Sequence[BoxChanges], num_shares: int) -> list[list[BoxChanges]]:
    """Returns the boxes in shares of about as many elements: the largest box first, to the smallest share."""
    shares: list[list[BoxChanges]] = [[] for _ in range(num_shares)]
    sizes = [0] * num_shares
    for one in sorted(boxes, key=lambda one: one.at_K.numel(), reverse=True):
        smallest = sizes.index(min(sizes))
        shares[smallest].append(one)
        sizes[smallest] += one.at_K.numel()
    return shares


def _box_bits(placed: PlacedBox, spec: TensorSpec) -> BitsArray:
    """Returns the box's bits in its row-major order; on a CPU a view when they are contiguous."""
    return _host_bits(placed.view().reshape(-1), spec)


def _host_bits(flat_N: torch.Tensor, spec: TensorSpec) -> BitsArray:
    """Returns signed elements as bits: a view on a CPU."""
    held: BitsArray = flat_N.cpu().numpy().view(bits_dtype(spec.dtype))
    return held


def _box_digest(placed: PlacedBox, spec: TensorSpec) -> int:
    bits_N = _box_bits(placed, spec)
    total = start = 0
    for run in placed.box.runs(spec):
        total = add_digests(total, tensor_digest(run, bits_N[start : start + run.length]))
        start += run.length
    return total
