"""The worker extension: vLLM mixes this class into its workers, whose methods its control channel can then call.

    --worker-extension-cls weightline.serving.engines.vllm.worker.WeightlineWorker

vLLM imports this module in every worker before it builds the model. Arguments and answers are JSON, as the HTTP form of
the control channel wants; an answer is {"result": ..}, or the error in the form of `http_errors`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from vllm.platforms import current_platform

from weightline.errors import ApplyError, WeightlineError
from weightline.serving.engines.vllm.cpu import prepare_cpu_worker
from weightline.serving.engines.vllm.features import WORKER, require
from weightline.serving.engines.vllm.jobs import Job
from weightline.serving.engines.vllm.plugin import register
from weightline.serving.engines.vllm.state import WorkerWeights
from weightline.serving.http.errors import error_body
from weightline.types import TensorSpec

if current_platform.is_cpu():
    prepare_cpu_worker()
register()


class WeightlineWorker:
    """Each method's name begins with `weightline_`, so that none meets one of vLLM's."""

    def weightline_load(self, request: str) -> str:
        """{"folder"}: replace all weights by those of a checkpoint folder, by vLLM's own loader."""

        def load() -> dict[str, Any]:
            require(WORKER)
            # vLLM was started without weights ("dummy"), which is no way to load any.
            self.vllm_config.load_config.load_format = "safetensors"  # type: ignore[attr-defined]
            self.reload_weights(weights_path=json.loads(request)["folder"])  # type: ignore[attr-defined]
            return {}

        return _answer(load)

    def weightline_learn(self, request: str) -> str:
        """{"specs": [[name, dtype, shape], ..]}: map the tensors to the parameters."""

        def learn() -> dict[str, Any]:
            specs = [TensorSpec(name, dtype, tuple(shape)) for name, dtype, shape in json.loads(request)["specs"]]
            self._weightline_weights = WorkerWeights(_plain_model(self))
            with _config_of(self):
                return self._weightline_weights.learn({spec.name: spec for spec in specs})

        return _answer(learn)

    def weightline_own(self, request: str) -> str:
        """{"owned": [{tensor: [box, ..]}, ..]}, by rank: which boxes each worker answers for."""
        return _answer(lambda: _weights_of(self).own(json.loads(request)["owned"][self.rank]))  # type: ignore[attr-defined]

    def weightline_call(self, request: str) -> str:
        """{"method", "arguments": {..}}: call the weights' method and wait for it: in a pause."""
        return _answer(lambda: _call(self, request))

    def weightline_begin(self, request: str) -> str:
        """The same beside vLLM's loop: requests go on. One at a time."""

        def begin() -> dict[str, Any]:
            job: Job | None = getattr(self, "_weightline_job", None)
            if job is not None and not job.is_done:
                raise ApplyError("another job is under way in this worker")
            self._weightline_job = Job(lambda: _call(self, request))
            return {}

        return _answer(begin)

    def weightline_poll(self) -> str:
        """{"is_done", "result"} of what was begun."""

        def poll() -> dict[str, Any]:
            job: Job | None = getattr(self, "_weightline_job", None)
            if job is None:
                raise ApplyError("no job was begun in this worker")
            return {"is_done": True, "result": job.result()} if job.is_done else {"is_done": False}

        return _answer(poll)


def _call(worker: Any, request: str) -> Any:
    called = json.loads(request)
    method = called["method"]
    if method not in _CALLABLE:
        raise ApplyError(f"there is no {method!r} to call")
    return getattr(_weights_of(worker), method)(**called["arguments"])


_CALLABLE = frozenset({"read_digests", "read_bits", "stage", "write", "unstage"})


def _weights_of(worker: Any) -> WorkerWeights:
    weights: WorkerWeights | None = getattr(worker, "_weightline_weights", None)
    if weights is None:
        raise ApplyError("the engine's parameters were not mapped: load a version first")
    return weights


def _answer(work: Callable[[], Any]) -> str:
    """JSON of the result or of the error: types do not survive vLLM's channel."""
    try:
        return json.dumps({"result": work()})
    except WeightlineError as error:
        return json.dumps(error_body(str(error), str(error.kind), error.facts))


def _plain_model(worker: Any) -> Any:
    """The worker's model. ApplyError for one whose weights are not what the chain holds."""
    config = worker.vllm_config
    if config.model_config.quantization is not None:
        raise ApplyError(
            f"vLLM runs the model quantized ({config.model_config.quantization}): its weights are computed from the "
            "chain's, not copies of them",
            quantization=config.model_config.quantization,
        )
    if config.lora_config is not None:
        raise ApplyError("vLLM runs with LoRA enabled, which wraps the layers that hold the weights: start it without")
    return worker.model_runner.get_model()


def _config_of(worker: Any) -> Any:
    """Loaders look at vLLM's current configuration."""
    from vllm.config import set_current_vllm_config

    return set_current_vllm_config(worker.vllm_config)
