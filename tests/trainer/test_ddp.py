"""Plain data parallelism: every rank holds all weights, and publishes an even slice of each."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.ranks import run_ranks_to_end
from tests.trainer import ddp_ranks
from weightline.chain.read.history import open_chain
from weightline.chain.replay.state import read_state
from weightline.chain.upkeep.verify import verify_chain
from weightline.codec.torch_ops import bits_of

pytestmark = pytest.mark.train


@pytest.mark.parametrize("coding", ["gap", "gap-by-magnitude"])
def test_two_ranks_publish_their_slices(coding: str, tmp_path: Path) -> None:
    url = f"file://{tmp_path}/bucket/chain"
    run_ranks_to_end(ddp_ranks.main, (url, coding, tmp_path), tmp_path / "ranks.log")
    chain = open_chain(url)
    manifests = chain.manifests()
    assert [m.kind for m in manifests] == ["anchor", "delta", "delta", "delta"]
    assert [m.coding for m in manifests[1:]] == [coding] * 3
    # Both ranks wrote a part of every version.
    assert [sorted(payload.rank for payload in m.payloads) for m in manifests] == [[0, 1]] * 4
    assert verify_chain(chain).holds
    state = read_state(chain, 3)
    for rank in range(2):
        for name, tensor in load_file(tmp_path / f"end-{rank}.safetensors").items():
            assert state.bits[name].tobytes() == bits_of(tensor.reshape(-1)).tobytes(), name
