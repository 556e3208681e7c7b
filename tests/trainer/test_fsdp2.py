"""FSDP2 (DTensor shards): the callback's session publishes them as it does ZeRO-3's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.ranks import run_ranks_to_end
from tests.trainer import fsdp2_ranks
from weightline.chain.read.history import open_chain
from weightline.chain.replay.state import read_state
from weightline.chain.upkeep.verify import verify_chain
from weightline.codec.torch_ops import bits_of

pytestmark = pytest.mark.train


@pytest.mark.parametrize("computes_in", [None, torch.bfloat16], ids=str)
def test_two_ranks_publish_their_rows(computes_in: torch.dtype | None, tmp_path: Path) -> None:
    """Mixed precision holds float32 rows, which are published in the dtype of computing."""
    url = f"file://{tmp_path}/bucket/chain"
    run_ranks_to_end(fsdp2_ranks.main, (url, tmp_path / "end.safetensors", computes_in), tmp_path / "ranks.log")
    chain = open_chain(url)
    assert [m.kind for m in chain.manifests()] == ["anchor", "delta", "delta", "delta"]
    assert verify_chain(chain).holds
    state = read_state(chain, 3)
    for name, held in load_file(tmp_path / "end.safetensors").items():
        assert held.dtype == torch.float32
        tensor = held if computes_in is None else held.to(computes_in)
        assert state.bits[name].tobytes() == bits_of(tensor.reshape(-1)).tobytes(), name
