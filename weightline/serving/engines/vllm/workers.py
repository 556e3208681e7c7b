"""All of an engine's workers as one: called together, their answers checked and put together.

Legend: N elements of a tensor.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from weightline.codec.digest import add_digests, parse_digest
from weightline.dtypes import bits_dtype
from weightline.errors import ApplyError
from weightline.serving.engines.vllm.boxes import Box, Owned, box_from_json, share_out
from weightline.serving.engines.vllm.exchange import allocate
from weightline.serving.http.errors import error_of
from weightline.types import BitsArray, TensorSpec

_FIRST_POLL_SECONDS = 0.001
_LONGEST_POLL_SECONDS = 0.05


class Channel(Protocol):
    """vLLM's control channel: the method of every worker, with string arguments; an answer a worker, by rank."""

    def call_workers(self, method: str, *arguments: str) -> Sequence[str]: ...


class Workers:
    """One thread at a time."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._boxes: list[dict[str, list[Box]]] = []
        self._owned: Owned = []

    def load(self, folder: Path) -> None:
        """Replace all weights by vLLM's own loader."""
        self._ask("weightline_load", {"folder": str(folder)})

    def learn(self, specs: Mapping[str, TensorSpec]) -> None:
        """Map the tensors on every worker, share them out, and prove that each element has its places."""
        told = self._ask("weightline_learn", {"specs": [(s.name, s.dtype, s.shape) for s in specs.values()]})
        self._boxes = [
            {name: [box_from_json(raw) for raw in boxes] for name, boxes in one["boxes"].items()} for one in told
        ]
        self._owned = share_out(specs, self._boxes)
        self._ask("weightline_own", {"owned": self._owned})

    def stage(self, path: Path) -> int:
        """Make the file's changes ready beside the engine's loop; the number of elements that found their place."""
        return sum(one["num_elements"] for one in self._work("stage", path=str(path)))

    def write(self, *, is_back: bool = False) -> dict[str, int]:
        """Write what is staged, everywhere; what that adds to the digests, by tensor. Called in a pause."""
        told = self._ask("weightline_call", {"method": "write", "arguments": {"is_back": is_back}})
        total: dict[str, int] = {}
        for one in told:
            for name, digest in one["digests"].items():
                total[name] = add_digests(total.get(name, 0), parse_digest(digest))
        return total

    def unstage(self) -> None:
        self._ask("weightline_call", {"method": "unstage", "arguments": {}})

    def read_bits(self, spec: TensorSpec, path: Path) -> BitsArray:
        """A tensor's N bits, by way of a file that is gone afterwards."""
        allocate(path, spec.nbytes)
        bits_N = np.memmap(path, bits_dtype(spec.dtype), "r+", shape=(spec.num_elements,))
        try:
            self._work("read_bits", name=spec.name, path=str(path))
        finally:
            path.unlink()
        return bits_N

    def read_digests(self, names: Iterable[str]) -> dict[str, int]:
        """The digests of the state that all workers hold together. ApplyError when copies of one part differ."""
        found = [one["digests"] for one in self._work("read_digests", names=list(names))]
        total: dict[str, int] = {}
        seen: dict[tuple[str, Box], str] = {}
        for boxes_of, owned, digests_of in zip(self._boxes, self._owned, found, strict=True):
            for name, digests in digests_of.items():
                for number, digest in enumerate(digests):
                    _require_equal_copies(seen, name, boxes_of[name][number], digest)
                    if number in owned.get(name, ()):
                        total[name] = add_digests(total.get(name, 0), parse_digest(digest))
        return total

    def _work(self, method: str, **arguments: Any) -> list[Any]:
        """A call beside the engine's loop: begin, then ask until all workers are done."""
        self._ask("weightline_begin", {"method": method, "arguments": arguments})
        wait_seconds = _FIRST_POLL_SECONDS
        while True:
            time.sleep(wait_seconds)
            wait_seconds = min(2 * wait_seconds, _LONGEST_POLL_SECONDS)
            told = self._results(self._channel.call_workers("weightline_poll"))
            if all(one["is_done"] for one in told):
                return [one["result"] for one in told]

    def _ask(self, method: str, request: Mapping[str, Any]) -> list[Any]:
        return self._results(self._channel.call_workers(method, json.dumps(request)))

    def _results(self, answers: Sequence[str]) -> list[Any]:
        """Every worker's result. Raises the first error that one of them answered, by its type."""
        told = [json.loads(answer) for answer in answers]
        for one in told:
            if "error" in one:
                raise error_of(one, "a vLLM worker failed")
        return [one["result"] for one in told]


def _require_equal_copies(seen: dict[tuple[str, Box], str], name: str, box: Box, digest: str) -> None:
    if seen.setdefault((name, box), digest) != digest:
        raise ApplyError(f"two workers hold different bits of one part of {name}", tensor=name)
