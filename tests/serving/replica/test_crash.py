"""kill -9 of a replica at every step of an apply: it comes back at a checked version."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.serving.model_chains import assert_same_bits, engine_bits, fresh_bits, make_chain
from tests.waiting import PATIENCE_SECONDS
from weightline.serving.engines.base import GenerationRequest
from weightline.serving.engines.transformers import TransformersEngine
from weightline.serving.replica.replica import Replica
from weightline.serving.replica.status import read_mark

REPOSITORY = Path(__file__).parents[3]


@pytest.mark.process
def test_a_replica_killed_at_any_step_comes_back_at_a_checked_version(tmp_path: Path) -> None:
    grown = make_chain((tmp_path / "bucket").as_uri(), num_versions=2)
    kill_points = ["withdrawn", "0", "7", str(len(grown.chain.manifest(1).tensors) - 1), "written", "proven"]
    killed = subprocess.run(
        [sys.executable, "-m", "tests.serving.replica.killed_replicas", grown.chain.url, str(tmp_path), *kill_points],
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=False,
    )
    assert killed.returncode == 0, killed.stderr
    base = fresh_bits(grown.chain, 0, tmp_path / "base")
    for kill_point in kill_points:
        state_dir = tmp_path / kill_point
        left = read_mark(state_dir)
        assert left is not None
        assert (left.status, left.version, left.moving_to) == ("moving", 0, 1)
        engine = TransformersEngine("cpu")
        replica = Replica(grown.chain, engine, state_dir, "replica-0")
        facts = replica.recover()
        assert facts is not None
        assert facts.version == engine.generate(GenerationRequest(("1+1=",), max_tokens=1)).version == 0
        assert_same_bits(engine_bits(engine), base)
        assert replica.refresh().version == 1
