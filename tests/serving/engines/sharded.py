"""A toy of a sharded engine: workers on fused, sliced, padded parameters, driven by the very code that drives vLLM.

Only vLLM itself is missing: where it would carry calls to its workers, they are called here, one after the other.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from weightline.serving.engines.barrier import RequestBarrier
from weightline.serving.engines.base import Completion, GenerationRequest
from weightline.serving.engines.vllm.driver import VllmEngine
from weightline.serving.engines.vllm.memory import WorkerWeights
from weightline.serving.engines.vllm.wire import answer_of, specs_from_json

WIDTH, HEADS, VOCAB_SIZE = 8, 4, 10
#: Of the checkpoint that the toys hold.
SHAPES: dict[str, tuple[int, ...]] = {
    "embed.weight": (VOCAB_SIZE, WIDTH),
    "norm.weight": (WIDTH,),
    "q.weight": (HEADS * 2, WIDTH),
    "k.weight": (2, WIDTH),
    "o.weight": (WIDTH, HEADS * 2),
    "experts.0.w.weight": (3, WIDTH),
    "experts.1.w.weight": (3, WIDTH),
}


class FusedModel(torch.nn.Module):
    """One rank's parameters: q and k fused, heads, inputs of `o` and vocabulary sliced, k and norm replicated."""

    def __init__(self, rank: int, world_size: int, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.rank, self.world_size = rank, world_size
        rows = HEADS * 2 // world_size
        self.vocab_rows = -(-VOCAB_SIZE // world_size)

        def parameter(*shape: int) -> torch.nn.Parameter:
            return torch.nn.Parameter(torch.zeros(shape, dtype=dtype), requires_grad=False)

        self.qk = parameter(rows + 2, WIDTH)
        self.o = parameter(WIDTH, rows)
        self.norm = parameter(WIDTH)
        self.experts = parameter(2, 3, WIDTH)
        self.embed = parameter(self.vocab_rows + 2, WIDTH)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, loaded in weights:
            self._load(name, loaded)

    def _load(self, name: str, loaded: torch.Tensor) -> None:
        rows = self.o.shape[1]
        start = rows * self.rank
        if name == "q.weight":
            self.qk.data[:rows].copy_(loaded.narrow(0, start, rows))
        elif name == "k.weight":
            self.qk.data.narrow(0, rows, 2).copy_(loaded)
        elif name == "o.weight":
            self.o.data.copy_(loaded[:, start : start + rows])
        elif name == "norm.weight":
            self.norm.data[...] = loaded
        elif name.startswith("experts."):
            self.experts.data[int(name.split(".")[1])].copy_(loaded)
        elif name == "embed.weight":
            held = loaded[self.rank * self.vocab_rows : (self.rank + 1) * self.vocab_rows]
            self.embed.data[: held.shape[0]].copy_(held)
            self.embed.data[held.shape[0] :].fill_(0)
        else:
            raise KeyError(name)


class ToyTransport:
    """Implements `Transport` on workers in this process. `on_write` is called before each worker's write."""

    def __init__(self, models: Sequence[torch.nn.Module]) -> None:
        self.models = models
        self.workers = [WorkerWeights(model, rank) for rank, model in enumerate(models)]
        self.on_write: Callable[[int], None] = lambda rank: None
        self.events: list[str] = []

    def call_workers(self, method: str, *arguments: str) -> Sequence[str]:
        (request,) = arguments
        if method == "weightline_load":
            return [self._load(rank, **json.loads(request)) for rank in range(len(self.workers))]
        assert method == "weightline_call"
        return [self._call(rank, request) for rank in range(len(self.workers))]

    def _load(self, rank: int, folder: str, specs: Sequence[Any]) -> str:
        _load(self.models[rank], Path(folder))
        return answer_of(lambda: self.workers[rank].learn(specs_from_json(specs)))

    def _call(self, rank: int, request: str) -> str:
        if json.loads(request)["method"] == "write":
            self.on_write(rank)
        return self.workers[rank].call(request)

    def pause(self) -> None:
        self.events.append("pause")

    def resume(self) -> None:
        self.events.append("resume")

    def drop_prefix_cache(self) -> None:
        self.events.append("drop prefixes")

    def report_version(self, version: int | None) -> None:
        self.events.append(f"version {version}")

    def generate(self, request: GenerationRequest) -> tuple[tuple[Completion, ...], tuple[tuple[int, ...], ...]]:
        return (Completion("", "stop"),), ((),)


def _load(model: torch.nn.Module, folder: Path) -> None:
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            model.load_weights((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118


def toy_engine(world_size: int, model_folder: Path) -> tuple[VllmEngine, ToyTransport]:
    """An engine on `world_size` toy workers."""
    transport = ToyTransport([FusedModel(rank, world_size) for rank in range(world_size)])
    return VllmEngine(transport, RequestBarrier(), model_folder), transport
