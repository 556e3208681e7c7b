"""What two ranks decide together at checkpoints and at the end of training, and models that are refused on both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from tests.ranks import run_ranks_to_end
from tests.trainer.settle_ranks import main
from weightline.chain.read.history import Chain, open_chain
from weightline.chain.upkeep.verify import verify_chain
from weightline.chain.write.standalone import commit_folder
from weightline.errors import InputError
from weightline.store.memory import MemoryStore
from weightline.trainer.session import PublishSession
from weightline.trainer.settings import PublishSettings


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where both ranks left what they saw, and their chains."""
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks_to_end(main, [str(folder)], folder / "log")
    return folder


@pytest.fixture(scope="module")
def seen(folder: Path) -> list[dict[str, Any]]:
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.train
def test_ranks_settle_a_version_where_any_of_them_has_a_change(folder: Path, seen: list[dict[str, Any]]) -> None:
    assert [one["settled"] for one in seen] == [[0, 1, 1, 2]] * 2
    chain = open_chain(f"file://{folder}/settle")
    assert [(m.num_changed, m.is_milestone) for m in chain.manifests(1)] == [(8, False), (0, True), (8, False)]
    assert chain.tip().metrics == {"loss": 0.5}
    assert verify_chain(chain).holds


@pytest.mark.train
@pytest.mark.parametrize("kind", ["whole", "flat", "a part", "inside", "inside, flat"])
def test_fsdp_1_is_refused_by_name(kind: str, folder: Path, seen: list[dict[str, Any]]) -> None:
    for one in seen:
        assert "FSDP 1 (FullyShardedDataParallel) is not supported" in one[kind]
        assert "fsdp_version: 2" in one[kind]
    assert open_chain(f"file://{folder}/{kind}").tip_version() is None


def test_a_state_without_a_single_element_is_refused(tmp_path: Path) -> None:
    chain = Chain(MemoryStore())
    model = torch.nn.Linear(4, 4)
    for parameter in model.parameters():
        parameter.data = torch.empty(0)
    with pytest.raises(InputError, match="the model has no tensor with an element"):
        PublishSession(chain, PublishSettings()).start(model)
    save_file(
        {"weight": np.zeros((0,), np.float32), "bias": np.zeros((0, 4), np.float32)}, tmp_path / "model.safetensors"
    )
    with pytest.raises(InputError, match="the state has no tensor with an element"):
        commit_folder(chain, tmp_path)
    assert list(chain.store.list("commits/")) == []
