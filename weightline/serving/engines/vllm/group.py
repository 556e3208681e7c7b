"""The workers of a vLLM as one: calls them together, checks and sums their answers.

Where each tensor lies in the memory of one worker alone, workers decode payloads by themselves, and neither bits nor
positions pass between the processes. Otherwise the base bits are read from them, and the changes sent to them, through
shared memory.

Legend: N elements of a tensor.
"""

from __future__ import annotations

import itertools
import json
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from weightline.codec.digest import add_digests
from weightline.dtypes import bits_dtype
from weightline.errors import ApplyError, WeightlineError
from weightline.serving.engines.base import Completion, GenerationRequest
from weightline.serving.engines.vllm.mapping import Assignment, Box, assign_boxes, box_from_json, is_each_held_once
from weightline.serving.engines.vllm.wire import allocate, results_of, specs_to_json, write_changes
from weightline.types import BitsArray, Changes, TensorSpec

_logger = logging.getLogger(__name__)

_FIRST_POLL_SECONDS = 0.001
_LONGEST_POLL_SECONDS = 0.02
#: Tensors as large as this stay in shared memory when they are read; smaller ones are copied.
_MAPPED_NBYTES = 32 * 1024**2
_NOT_KEPT = "the engine does not keep the changes any more: prepare them again"


class Transport(Protocol):
    """The calls to a vLLM. Errors are ApplyError."""

    def call_workers(self, method: str, *arguments: str) -> Sequence[str]:
        """Calls a method of every worker; returns an answer a worker, by rank."""
        ...

    def pause(self) -> None:
        """Stops generation; requests that the barrier let through wait in vLLM's queue."""
        ...

    def resume(self) -> None:
        """Continues generation."""
        ...

    def drop_prefix_cache(self) -> None:
        """Drops every cached key-value block. Called in a pause."""
        ...

    def report_version(self, version: int | None) -> None:
        """Sets the version that vLLM names in its own answers, if it supports that."""
        ...

    def generate(self, request: GenerationRequest) -> tuple[tuple[Completion, ...], tuple[tuple[int, ...], ...]]:
        """Returns (completions, token ids of the prompts)."""
        ...


class WorkerGroup:
    """All workers of a vLLM: calls them together, and checks and sums their answers. For one thread at a time."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._boxes: list[dict[str, list[Box]]] = []
        self._assignments: list[Assignment] = []
        #: Whether each tensor is in the memory of one worker alone, so that workers can decode payloads by themselves.
        self.can_decode = False
        #: The decoding whose changes the workers keep.
        self.kept: WorkerDecoding | None = None

    def load(self, folder: Path, specs: Mapping[str, TensorSpec]) -> None:
        """Replaces all weights by vLLM's own loader, maps the tensors, and assigns every element to one worker."""
        self.kept, self.can_decode = None, False
        found = self._request("weightline_load", {"folder": str(folder), "specs": specs_to_json(specs)})
        self._boxes = [
            {name: [box_from_json(raw) for raw in boxes] for name, boxes in one["boxes"].items()} for one in found
        ]
        self._assignments = assign_boxes(specs, self._boxes)
        self._call("assign", assignments=self._assignments)
        self.can_decode = is_each_held_once(specs, self._boxes)

    def decode(self, one: WorkerDecoding, payloads: Sequence[Path], *, is_backward: bool) -> tuple[dict[str, int], int]:
        """Decodes the payloads of one step. Workers keep the changes, unless the step fails; then they drop them.

        Returns (changes of the digests by tensor, number of elements that now differ from the memory).
        """
        if one.num_steps and self.kept is not one:
            raise ApplyError(_NOT_KEPT)
        self.kept = None
        paths = [str(path) for path in payloads]
        found = self._work("decode", ticket=one.ticket, step=one.num_steps, paths=paths, is_backward=is_backward)
        self.kept = one
        return _summed(answer["digests"] for answer in found), sum(answer["num_changed"] for answer in found)

    def drop(self, one: WorkerDecoding) -> None:
        """Frees what the workers keep of a decoding. Safe to repeat."""
        if self.kept is one:
            self.kept = None
            self._call("unstage")

    def stage_decoded(self, one: WorkerDecoding) -> None:
        """Prepares decoded changes for the write, while the engine serves. ApplyError when they are not kept."""
        if self.kept is not one:
            raise ApplyError(_NOT_KEPT)
        self.kept = None
        self._require_placed(self._work("stage_decoded", ticket=one.ticket), one.num_changed)

    def stage(self, changes: Sequence[Changes], path: Path) -> None:
        """Prepares changes for the write, while the engine serves, by way of a file that is removed afterwards."""
        self.kept = None
        write_changes(path, changes)
        try:
            answers = self._work("stage", path=str(path))
        finally:
            path.unlink()
        self._require_placed(answers, sum(one.num_changed for one in changes))

    def _require_placed(self, answers: Sequence[Any], num_changed: int) -> None:
        num_placed = sum(one["num_elements"] for one in answers)
        if num_placed != num_changed:
            raise ApplyError(f"only {num_placed} of {num_changed} changed elements have an address in the engine")

    def write(self, *, is_undo: bool) -> dict[str, int]:
        """Writes the staged changes on all workers. Returns their changes of the digests, by tensor."""
        return _summed(one["digests"] for one in self._call("write", is_undo=is_undo))

    def read_bits(self, spec: TensorSpec, path: Path) -> BitsArray:
        """Returns a tensor's N bits, by way of a file that is removed afterwards."""
        allocate(path, spec.nbytes)
        bits_N = np.memmap(path, bits_dtype(spec.dtype), "r+", shape=(spec.num_elements,))
        try:
            self._work("read_bits", name=spec.name, path=str(path))
        finally:
            path.unlink()
        # A map holds a file descriptor, and a mixture has thousands of small tensors.
        return np.array(bits_N) if bits_N.nbytes < _MAPPED_NBYTES else bits_N

    def read_digests(self, names: Iterable[str]) -> dict[str, int]:
        """Returns the digests of the workers' state together. ApplyError when copies of one part differ."""
        found = [one["digests"] for one in self._work("read_digests", names=list(names))]
        total: dict[str, int] = {}
        digest_of: dict[tuple[str, Box], int] = {}
        for boxes_of, assignment, digests_of in zip(self._boxes, self._assignments, found, strict=True):
            for name, digests in digests_of.items():
                for number, digest in enumerate(digests):
                    if digest_of.setdefault((name, boxes_of[name][number]), digest) != digest:
                        raise ApplyError(f"two workers hold different bits of one part of {name}", tensor=name)
                    if number in assignment.get(name, ()):
                        total[name] = add_digests(total.get(name, 0), digest)
        return total

    def _work(self, method: str, **arguments: Any) -> list[Any]:
        """Runs a call in background threads of the workers, whose loop continues, and waits until all are done."""
        self._call(method, is_background=True, **arguments)
        wait_seconds = _FIRST_POLL_SECONDS
        while True:
            time.sleep(wait_seconds)
            wait_seconds = min(2 * wait_seconds, _LONGEST_POLL_SECONDS)
            found = self._call("poll")
            if all(one["is_done"] for one in found):
                return [one["result"] for one in found]

    def _call(self, method: str, *, is_background: bool = False, **arguments: Any) -> list[Any]:
        request = {"method": method, "arguments": arguments, "is_background": is_background}
        return self._request("weightline_call", request)

    def _request(self, worker_method: str, request: Mapping[str, Any]) -> list[Any]:
        return results_of(self._transport.call_workers(worker_method, json.dumps(request)))


class WorkerDecoding:
    """Implements `Decoding`: the workers decode against their memory and keep the changes, under a ticket.

    `calling` is held while workers are called.
    """

    _tickets = itertools.count()

    def __init__(self, workers: WorkerGroup, calling: AbstractContextManager[Any]) -> None:
        self.ticket, self.num_steps, self.num_changed = next(self._tickets), 0, 0
        self.digests: dict[str, int] = {}
        self._workers, self._calling = workers, calling

    @property
    def is_kept(self) -> bool:
        return self._workers.kept is self

    def apply(self, payloads: Sequence[Path], *, is_backward: bool) -> dict[str, int]:
        with self._calling:
            changes, self.num_changed = self._workers.decode(self, payloads, is_backward=is_backward)
        self.num_steps += 1
        self.digests = _summed((self.digests, changes))
        return changes

    def discard(self) -> None:
        try:
            with self._calling:
                self._workers.drop(self)
        except WeightlineError as error:
            _logger.warning("the workers did not drop what they decoded: %s", error)


def _summed(found: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Returns the sums of digests by tensor, without those that are zero."""
    total: dict[str, int] = {}
    for digests in found:
        for name, digest in digests.items():
            total[name] = add_digests(total.get(name, 0), digest)
    return {name: digest for name, digest in total.items() if digest}
