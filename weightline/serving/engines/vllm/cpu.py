"""vLLM on a CPU: weights that stay in their parameters, and the AMX permission.

By default vLLM's CPU linears compute from packed copies of their weights, which no write to a parameter reaches. Where
this plugin is loaded, and only there, they compute from the parameter itself: `dispatch_cpu_unquantized_gemm` is
replaced in the worker's process. That is a monkeypatch; `require_unpacked` refuses a model that escaped it.
"""

from __future__ import annotations

from typing import Any

import torch

from weightline.errors import ApplyError, UnsupportedFeatureError

_LAYERS = "vllm.model_executor.layers.utils"
_DISPATCH = "dispatch_cpu_unquantized_gemm"


def prepare_cpu_worker() -> None:
    """Before the model is built. Safe to repeat. UnsupportedFeatureError when vLLM's linears are chosen elsewhere."""
    import vllm.model_executor.layers.utils as layers

    # Nothing else asks the kernel for AMX tiles in eager mode, and the first tile instruction would end the process.
    init_amx = getattr(torch.cpu, "_init_amx", None)
    if init_amx is not None:
        init_amx()
    if not hasattr(layers, _DISPATCH):
        raise UnsupportedFeatureError(
            f"this vLLM has no {_LAYERS}.{_DISPATCH}: its CPU linears cannot be kept unpacked", feature=_DISPATCH
        )
    setattr(layers, _DISPATCH, _keep_unpacked)


def _keep_unpacked(layer: Any, remove_weight: bool) -> None:
    """Compute from the parameter."""
    layer.cpu_linear = torch.nn.functional.linear


def require_unpacked(model: torch.nn.Module) -> None:
    """ApplyError for a layer that computes from a copy of its weight: a write to the weight would change nothing."""
    for name, module in model.named_modules():
        linear = getattr(module, "cpu_linear", torch.nn.functional.linear)
        if linear is not torch.nn.functional.linear:
            raise ApplyError(
                f"{name} computes from a packed copy of its weight. Start vLLM with "
                "--worker-extension-cls weightline.serving.engines.vllm.worker.WeightlineWorker",
                layer=name,
            )
