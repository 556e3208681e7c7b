"""Training ranks as we start them, publishing to a bucket over the network."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import safetensors

from weightline.chain.read.history import open_chain
from weightline.chain.replay.state import read_state
from weightline.chain.upkeep.verify import verify_chain

_RANK_PROGRAM = Path(__file__).parents[1] / "trainer" / "ddp_ranks.py"


@pytest.mark.slow
@pytest.mark.parametrize("any_url", ["s3", "hub"], indirect=True)
def test_two_ranks_publish_over_the_network(any_url: str, tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launch, str(_RANK_PROGRAM), any_url, "gap", str(tmp_path)], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-4000:]
    chain = open_chain(any_url)
    assert [sorted(payload.rank for payload in m.payloads) for m in chain.manifests()] == [[0, 1]] * 4
    assert verify_chain(chain).holds
    assert read_state(chain, 3).specs.keys() == _names(tmp_path / "end-0.safetensors")


def _names(path: Path) -> set[str]:
    with safetensors.safe_open(path, framework="np") as file:
        return set(file.keys())
