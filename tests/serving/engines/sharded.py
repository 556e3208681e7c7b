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

from weightline.errors import WeightlineError
from weightline.serving.engines.barrier import RequestBarrier
from weightline.serving.engines.base import Completion, GenerationRequest
from weightline.serving.engines.vllm.engine import VllmEngine
from weightline.serving.engines.vllm.state import WorkerWeights
from weightline.serving.http.errors import error_body
from weightline.types import TensorSpec

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
        self.workers = [WorkerWeights(model) for model in models]
        self.on_write: Callable[[int], None] = lambda rank: None
        self.events: list[str] = []
        self._results: list[Any] = []

    def call_workers(self, method: str, *arguments: str) -> Sequence[str]:
        request = json.loads(arguments[0]) if arguments else {}
        return [self._call(rank, method, request) for rank in range(len(self.workers))]

    def _call(self, rank: int, method: str, request: dict[str, Any]) -> str:
        try:
            return json.dumps({"result": self._run(rank, method, request)})
        except WeightlineError as error:
            return json.dumps(error_body(str(error), str(error.kind), error.facts))

    def _run(self, rank: int, method: str, request: dict[str, Any]) -> Any:
        worker = self.workers[rank]
        if method == "weightline_load":
            return _load(self.models[rank], Path(request["folder"]))
        if method == "weightline_learn":
            specs = [TensorSpec(name, dtype, tuple(shape)) for name, dtype, shape in request["specs"]]
            return worker.learn({spec.name: spec for spec in specs})
        if method == "weightline_own":
            return worker.own(request["owned"][rank])
        if method == "weightline_poll":
            return {"is_done": True, "result": self._results[rank]}
        if request["method"] == "write":
            self.on_write(rank)
        result = getattr(worker, request["method"])(**request["arguments"])
        if method == "weightline_begin":
            self._results[rank:] = [result]
        return result

    def pause(self) -> None:
        self.events.append("pause")

    def resume(self) -> None:
        self.events.append("resume")

    def forget_prefixes(self) -> None:
        self.events.append("forget")

    def tell_version(self, version: int | None) -> None:
        self.events.append(f"version {version}")

    def generate(self, request: GenerationRequest) -> tuple[tuple[Completion, ...], int]:
        return (Completion("", 0, "stop"),), 0


def _load(model: torch.nn.Module, folder: Path) -> dict[str, Any]:
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            model.load_weights((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118
    return {}


def toy_engine(world_size: int, model_folder: Path) -> tuple[VllmEngine, ToyTransport]:
    """An engine on `world_size` toy workers."""
    transport = ToyTransport([FusedModel(rank, world_size) for rank in range(world_size)])
    return VllmEngine(transport, RequestBarrier(), model_folder), transport
