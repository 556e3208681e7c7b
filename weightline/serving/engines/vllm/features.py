"""The features that a vLLM must have, checked by name and never by version number; and the plugin's entry point."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterable

from weightline.errors import UnsupportedFeatureError

Feature = tuple[str, str, str]
"""Module, attribute path, purpose."""

WORKER: tuple[Feature, ...] = (
    ("vllm.v1.worker.gpu_worker", "Worker.reload_weights", "loading a version from a folder"),
)
SERVER: tuple[Feature, ...] = (
    ("vllm.v1.engine.async_llm", "AsyncLLM.collective_rpc", "reaching the workers"),
    ("vllm.v1.engine.async_llm", "AsyncLLM.pause_generation", "stopping generation while weights are written"),
    ("vllm.v1.engine.async_llm", "AsyncLLM.resume_generation", "continuing after a refresh"),
    ("vllm.v1.engine.async_llm", "AsyncLLM.reset_prefix_cache", "dropping key-value blocks of the old version"),
)
OFFLINE: tuple[Feature, ...] = (
    ("vllm", "LLM.collective_rpc", "reaching the workers"),
    ("vllm", "LLM.reset_prefix_cache", "dropping key-value blocks of the old version"),
)
BACKEND: tuple[Feature, ...] = (
    ("vllm.distributed.weight_transfer.base", "WeightTransferEngine", "the weight-transfer backend"),
    ("vllm.distributed.weight_transfer.factory", "WeightTransferEngineFactory.register_engine", "registering it"),
)
BACKEND_NAME = "weightline"


def missing(features: Iterable[Feature]) -> list[str]:
    """Returns those that this vLLM lacks, as `module.attribute (purpose)`."""
    return [f"{module}.{path} ({use})" for module, path, use in features if not _has(module, path)]


def require(features: Iterable[Feature]) -> None:
    """Raises UnsupportedFeatureError naming every missing feature, also when no vLLM is installed."""
    lacking = missing(features)
    if lacking:
        raise UnsupportedFeatureError(
            f"the installed vLLM lacks {'; '.join(lacking)}. docs/serving.md names builds that have them",
            feature=lacking[0],
        )


def register_backend() -> None:
    """Registers the weight-transfer backend with vLLM, if this vLLM has the interface. Safe to repeat.

    This is the entry point of group `vllm.general_plugins`, which vLLM calls in each of its processes. The backend's
    module is imported only when vLLM creates the backend, so servers without it are not affected.
    """
    if missing(BACKEND):
        return
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    with contextlib.suppress(ValueError):  # it is registered already: vLLM may load its plugins more than once
        WeightTransferEngineFactory.register_engine(
            BACKEND_NAME, "weightline.serving.engines.vllm.backend", "WeightlineBackend"
        )


def _has(module: str, path: str) -> bool:
    try:
        found: object = importlib.import_module(module)
    except ImportError:
        return False
    for part in path.split("."):
        found = getattr(found, part, None)
        if found is None:
            return False
    return True
