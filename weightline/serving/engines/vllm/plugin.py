"""The entry point of group `vllm.general_plugins`: vLLM calls `register` in each of its processes.

It only makes the weight-transfer backend's name known; nothing of a server that does not use it changes.
"""

from __future__ import annotations

from weightline.serving.engines.vllm.features import BACKEND, missing

BACKEND_NAME = "weightline"


def register() -> None:
    """Register the backend where this vLLM has an interface for that. Safe to repeat."""
    if missing(BACKEND):
        return
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    if BACKEND_NAME not in getattr(WeightTransferEngineFactory, "_registry", {}):
        WeightTransferEngineFactory.register_engine(
            BACKEND_NAME, "weightline.serving.engines.vllm.backend", "WeightlineBackend"
        )
