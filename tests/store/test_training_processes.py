"""Training ranks as we start them, publishing to a bucket over the network."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors

from tests.ranks import run_ranks_to_end
from tests.trainer import ddp_ranks
from weightline.chain.read.history import open_chain
from weightline.chain.replay.state import read_state
from weightline.chain.upkeep.verify import verify_chain


@pytest.mark.train
@pytest.mark.parametrize("any_url", ["s3", "hub"], indirect=True)
def test_two_ranks_publish_over_the_network(any_url: str, tmp_path: Path) -> None:
    run_ranks_to_end(ddp_ranks.main, (any_url, "gap", tmp_path), tmp_path / "ranks.log")
    chain = open_chain(any_url)
    assert [sorted(payload.rank for payload in m.payloads) for m in chain.manifests()] == [[0, 1]] * 4
    assert verify_chain(chain).holds
    assert read_state(chain, 3).specs.keys() == _names(tmp_path / "end-0.safetensors")


def _names(path: Path) -> set[str]:
    with safetensors.safe_open(path, framework="np") as file:
        return set(file.keys())
