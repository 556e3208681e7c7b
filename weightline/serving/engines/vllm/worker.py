"""The worker extension: vLLM mixes this class into its workers, whose methods its control channel can then call.

    --worker-extension-cls weightline.serving.engines.vllm.worker.WeightlineWorker

vLLM imports this module in every worker before it builds the model, so that a CPU worker can be prepared: by default
vLLM's CPU linears compute from packed copies of their weights, which writes to the parameters do not change. In the
process that imports this module, `dispatch_cpu_unquantized_gemm` is replaced, so that the linears compute from the
parameters. This is a monkeypatch, since vLLM has no option for it; `mapping.require_unpacked` refuses a model that was
built without it. On a GPU nothing is replaced.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from vllm.config import set_current_vllm_config
from vllm.platforms import current_platform

from weightline.errors import ApplyError, UnsupportedFeatureError
from weightline.serving.engines.vllm.features import WORKER, register_backend, require
from weightline.serving.engines.vllm.memory import WorkerWeights
from weightline.serving.engines.vllm.wire import answer_of, specs_from_json

_LAYERS = "vllm.model_executor.layers.utils"
_DISPATCH = "dispatch_cpu_unquantized_gemm"


class WeightlineWorker:
    """The methods that the driver calls. Their prefix avoids clashes with vLLM's. Requests and answers are JSON."""

    def weightline_load(self, request: str) -> str:
        """Replaces all weights by those of a checkpoint {"folder"}, by vLLM's own loader, and maps the {"specs"}.

        Answers {"boxes"}: by tensor, the boxes that this worker holds.
        """

        def load() -> dict[str, Any]:
            require(WORKER)
            document = json.loads(request)
            # vLLM was started without weights, by the load format "dummy", from which no weights can be read.
            self.vllm_config.load_config.load_format = "safetensors"  # type: ignore[attr-defined]
            self.reload_weights(weights_path=document["folder"])  # type: ignore[attr-defined]
            self._weightline = WorkerWeights(_plain_model(self), self.rank)  # type: ignore[attr-defined]
            with set_current_vllm_config(self.vllm_config):  # type: ignore[attr-defined] # loaders read it
                return self._weightline.learn(specs_from_json(document["specs"]))

        return answer_of(load)

    def weightline_call(self, request: str) -> str:
        """Runs a request on the loaded weights: see `WorkerWeights.call`."""
        weights: WorkerWeights | None = getattr(self, "_weightline", None)
        return answer_of(_raise_unmapped) if weights is None else weights.call(request)


def _raise_unmapped() -> None:
    raise ApplyError("the engine's parameters were not mapped: load a version first")


def _plain_model(worker: Any) -> torch.nn.Module:
    """Returns the worker's model. ApplyError for a quantized one or one with LoRA: its weights are not the chain's."""
    config = worker.vllm_config
    if config.model_config.quantization is not None:
        raise ApplyError(
            f"vLLM runs the model quantized ({config.model_config.quantization}): its weights are computed from the "
            "chain's, not copies of them",
            quantization=config.model_config.quantization,
        )
    if config.lora_config is not None:
        raise ApplyError("vLLM runs with LoRA enabled, which wraps the layers that hold the weights: start it without")
    model: torch.nn.Module = worker.model_runner.get_model()
    return model


def _prepare_cpu_worker() -> None:
    """Keeps CPU linears unpacked and enables AMX tiles. Safe to repeat.

    UnsupportedFeatureError when this vLLM lacks the function that chooses the linears' implementation.
    """
    import vllm.model_executor.layers.utils as layers

    # In eager mode only this call requests AMX tiles from the kernel. Without it the first tile instruction would end
    # the process.
    init_amx = getattr(torch.cpu, "_init_amx", None)
    if init_amx is not None:
        init_amx()
    if not hasattr(layers, _DISPATCH):
        raise UnsupportedFeatureError(
            f"this vLLM has no {_LAYERS}.{_DISPATCH}: its CPU linears cannot be kept unpacked", feature=_DISPATCH
        )
    setattr(layers, _DISPATCH, _keep_unpacked)


def _keep_unpacked(layer: Any, remove_weight: bool) -> None:
    """Makes the layer compute from its parameter."""
    layer.cpu_linear = torch.nn.functional.linear


if current_platform.is_cpu():
    _prepare_cpu_worker()
register_backend()
