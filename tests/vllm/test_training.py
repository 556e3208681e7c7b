"""A training whose completions come from a real vLLM that follows its chain."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests import ROOT
from tests.stages.rewards import NOTES
from tests.vllm.parts import FolderChain
from tests.vllm.test_server import serving
from tests.waiting import PATIENCE_SECONDS, wait_until
from weightline.chain import open_chain
from weightline.chain.read.records import SAMPLES, read_records
from weightline.rollouts.record import parse_samples

NUM_STEPS = 25
#: The environment that has TRL. That of vLLM has not, since vLLM's dependencies exclude some of TRL's.
_TRAINING_PYTHON = ROOT / ".venv" / "bin" / "python"


@pytest.mark.timeout(1200)
def test_vllm_computes_what_the_trainer_computes_at_every_version(tmp_path: Path) -> None:
    """Two ZeRO-3 ranks in float32, a version a step. A replica at another version would differ a hundred times more."""
    chain = open_chain(f"file://{tmp_path}/bucket/chain")
    environment = {**os.environ, NOTES: str(tmp_path / "notes"), "OMP_NUM_THREADS": "1"}
    with (tmp_path / "training.log").open("w+") as log:
        training = subprocess.Popen(
            [_TRAINING_PYTHON, "-m", "tests.stages.exact_rollouts", str(tmp_path), str(NUM_STEPS)],
            cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            wait_until(lambda: chain.tip_version() is not None or training.poll() is not None)
            made = FolderChain(chain, tmp_path)
            with serving(made, tmp_path / "state", "--every", "0.1", "--dtype", "float32"):
                returncode = training.wait(4 * PATIENCE_SECONDS)
        finally:
            training.kill()
            training.wait()
        log.seek(0)
        assert returncode == 0, log.read()
    records = [parse_samples(record) for record in read_records(chain, SAMPLES)]
    assert [list(samples.made_by) for samples in records] == [[step] for step in range(NUM_STEPS)]
