"""What one worker knows of its weights, and what it can be asked to do with them. Free of vLLM."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from weightline.codec.digest import format_digest
from weightline.errors import ApplyError
from weightline.serving.engines.vllm.cpu import require_unpacked
from weightline.serving.engines.vllm.exchange import read_changes_file
from weightline.serving.engines.vllm.placement import Placement, learn_placement
from weightline.serving.engines.vllm.reading import Owned, place_digests, write_owned_bits
from weightline.serving.engines.vllm.staging import Staged, stage
from weightline.types import TensorSpec


class WorkerWeights:
    """One worker's part of the model. Calls come one at a time; none but `write` changes weights."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self._specs: dict[str, TensorSpec] = {}
        self._placement: Placement = {}
        self._owned: Owned = {}
        self._staged: Staged | None = None

    def learn(self, specs: Mapping[str, TensorSpec]) -> dict[str, Any]:
        """Map the tensors; return the boxes of each. ApplyError when the model cannot be refreshed in place."""
        require_unpacked(self._model)
        self._staged, self._owned, self._specs = None, {}, dict(specs)
        self._placement = learn_placement(self._model, specs)
        boxes = {name: [place.box.to_json() for place in places] for name, places in self._placement.items()}
        return {"boxes": boxes}

    def own(self, owned: Owned) -> dict[str, Any]:
        """Take over the boxes that this worker answers for."""
        self._owned = owned
        return {}

    def read_digests(self, names: list[str]) -> dict[str, Any]:
        """By tensor, the digest of each of its places here."""
        found = place_digests(self._placement, {name: self._spec(name) for name in names})
        return {"digests": {name: [format_digest(one) for one in of_places] for name, of_places in found.items()}}

    def read_bits(self, name: str, path: str) -> dict[str, Any]:
        """Write what this worker answers for into the file of the whole tensor."""
        write_owned_bits(self._placement, self._owned, self._spec(name), Path(path))
        return {}

    def stage(self, path: str) -> dict[str, Any]:
        """Make the file's changes ready. BaseMismatchError when the old bits are not here. Writes no weights."""
        self._staged = None
        staged = stage(self._placement, self._owned, read_changes_file(Path(path)))
        staged.check_base()
        self._staged = staged
        return {"num_elements": staged.num_elements}

    def write(self, *, is_back: bool) -> dict[str, Any]:
        """Write what is staged (or its inverse) and read it back; return what that adds to the state's digests.

        DigestMismatchError when the memory does not hold what was written. When it raises, any part may be written.
        """
        if self._staged is None:
            raise ApplyError("nothing is staged")
        staged = self._staged.turned_round() if is_back else self._staged
        staged.write()
        return {"digests": {name: format_digest(digest) for name, digest in staged.digests.items()}}

    def unstage(self) -> dict[str, Any]:
        """Forget what was staged. Safe to repeat."""
        self._staged = None
        return {}

    def _spec(self, name: str) -> TensorSpec:
        if name not in self._specs:
            raise ApplyError(f"the engine's parameters were not mapped for {name}: load the version", tensor=name)
        return self._specs[name]
