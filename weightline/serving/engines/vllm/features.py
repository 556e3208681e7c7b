"""What a vLLM must offer, looked for by feature and never by version number."""

from __future__ import annotations

import importlib
from collections.abc import Iterable

from weightline.errors import UnsupportedFeatureError

#: module, attribute path, what it is for.
Feature = tuple[str, str, str]

WORKER: tuple[Feature, ...] = (
    ("vllm.v1.worker.gpu_worker", "Worker.reload_weights", "loading a version from a folder"),
)
SERVER: tuple[Feature, ...] = (
    ("vllm.v1.engine.async_llm", "AsyncLLM.collective_rpc", "reaching the workers"),
    ("vllm.v1.engine.async_llm", "AsyncLLM.pause_generation", "standing still while weights are written"),
    ("vllm.v1.engine.async_llm", "AsyncLLM.resume_generation", "going on after a refresh"),
    ("vllm.v1.engine.async_llm", "AsyncLLM.reset_prefix_cache", "forgetting key-value blocks of the old version"),
)
OFFLINE: tuple[Feature, ...] = (
    ("vllm", "LLM.collective_rpc", "reaching the workers"),
    ("vllm", "LLM.reset_prefix_cache", "forgetting key-value blocks of the old version"),
)
BACKEND: tuple[Feature, ...] = (
    ("vllm.distributed.weight_transfer.base", "WeightTransferEngine", "the weight-transfer backend"),
    ("vllm.distributed.weight_transfer.factory", "WeightTransferEngineFactory.register_engine", "registering it"),
)


def missing(features: Iterable[Feature]) -> list[str]:
    """Those that this vLLM does not have, as `module.attribute (what for)`."""
    return [f"{module}.{path} ({use})" for module, path, use in features if not _has(module, path)]


def require(features: Iterable[Feature]) -> None:
    """UnsupportedFeatureError naming everything that is missing; it says so, too, when there is no vLLM at all."""
    lacking = missing(features)
    if lacking:
        raise UnsupportedFeatureError(
            f"the installed vLLM lacks {'; '.join(lacking)}. docs/serving.md names builds that have them",
            feature=lacking[0],
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
