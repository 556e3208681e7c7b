"""The weight-transfer backend `weightline`, for who drives vLLM by its own weight-update calls.

    --weight-transfer-config '{"backend": "weightline"}'
    init_weight_transfer_engine {"folder": CHECKPOINT}     the folder that vLLM loaded: its tensors are mapped
    start_weight_update, update_weights {"path": CHANGES}, finish_weight_update

CHANGES is a file of `exchange.write_changes`. Each worker checks that its memory holds the old bits before it writes,
and reads back what it wrote. Across workers nothing is undone here: `weightline serve vllm` does that.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo

from weightline.chain.files.source import FolderSource
from weightline.errors import ApplyError
from weightline.serving.engines.vllm.state import WorkerWeights


@dataclass
class FolderInfo(WeightTransferInitInfo):
    """The checkpoint folder whose tensors the engine holds."""

    folder: str


@dataclass
class ChangesInfo(WeightTransferUpdateInfo):
    """A file of changes that start from what the engine holds."""

    path: str


class WeightlineBackend(WeightTransferEngine[FolderInfo, ChangesInfo]):
    """One worker's end. Errors: ApplyError, BaseMismatchError (nothing written), DigestMismatchError (written back)."""

    init_info_cls = FolderInfo
    update_info_cls = ChangesInfo
    supports_draft_weight_update = False

    _weights: WorkerWeights | None = None

    def init_transfer_engine(self, init_info: FolderInfo) -> None:
        self._weights = WorkerWeights(self.model)
        with _config(self.vllm_config):
            self._weights.learn(FolderSource(Path(init_info.folder)).specs)

    def start_weight_update(self) -> None:
        """Nothing: changes are written in place."""

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """As the base class, which cannot synchronize a CPU."""
        self.receive_weights(self.parse_update_info(update_info))
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: ChangesInfo) -> None:
        if self._weights is None:
            raise ApplyError("call init_weight_transfer_engine first, with the folder that the engine loaded")
        self._weights.stage(update_info.path)
        is_written = False
        try:
            self._weights.write(is_back=False)
            is_written = True
        finally:
            if not is_written:
                self._weights.write(is_back=True)
            self._weights.unstage()

    def finish_weight_update(self) -> None:
        """Nothing is left to do."""

    def shutdown(self) -> None:
        """No connection is held."""


def _config(vllm_config: Any) -> AbstractContextManager[Any]:
    from vllm.config import set_current_vllm_config

    return set_current_vllm_config(vllm_config)
