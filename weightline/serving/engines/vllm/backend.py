"""The weight-transfer backend `weightline`: refreshes a vLLM that another tool drives by its weight-update calls.

    --weight-transfer-config '{"backend": "weightline"}'
    init_weight_transfer_engine {"folder": CHECKPOINT}     the folder that vLLM loaded: its tensors are mapped
    start_weight_update, update_weights {"path": CHANGES}, finish_weight_update

CHANGES is a file of `wire.write_changes`. Each worker checks that its memory holds the old bits before it writes, reads
back the written elements, and undoes its own write when that fails. An error of one worker does not undo the others'
writes; `weightline serve vllm` does.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from vllm.config import set_current_vllm_config
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo

from weightline.chain.files.source import FolderSource
from weightline.errors import ApplyError
from weightline.serving.engines.vllm.memory import WorkerWeights


@dataclass
class FolderInfo(WeightTransferInitInfo):
    """The checkpoint folder whose tensors the engine holds."""

    folder: str


@dataclass
class ChangesInfo(WeightTransferUpdateInfo):
    """A file of changes that start from the engine's weights."""

    path: str


class WeightlineBackend(WeightTransferEngine[FolderInfo, ChangesInfo]):
    """The backend of one worker.

    Raises ApplyError, BaseMismatchError (nothing is written) and DigestMismatchError (the write is undone).
    """

    init_info_cls = FolderInfo
    update_info_cls = ChangesInfo
    supports_draft_weight_update = False

    _weights: WorkerWeights | None = None

    def init_transfer_engine(self, init_info: FolderInfo) -> None:
        self._weights = WorkerWeights(self.model)
        with set_current_vllm_config(self.vllm_config):  # loaders read vLLM's current configuration
            self._weights.learn(FolderSource(Path(init_info.folder)).specs)

    def start_weight_update(self) -> None:
        """Does nothing: changes are written in place."""

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Receives the changes and waits for the device. Overrides the base class, which cannot synchronize a CPU."""
        self.receive_weights(self.parse_update_info(update_info))
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: ChangesInfo) -> None:
        if self._weights is None:
            raise ApplyError("call init_weight_transfer_engine first, with the folder that the engine loaded")
        self._weights.stage(update_info.path)
        is_written = False
        try:
            self._weights.write(is_undo=False)
            is_written = True
        finally:
            if not is_written:
                self._weights.write(is_undo=True)
            self._weights.unstage()

    def finish_weight_update(self) -> None:
        """Does nothing: the update is complete."""

    def shutdown(self) -> None:
        """Does nothing: no connection is held."""
