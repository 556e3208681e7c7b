"""kill -9 of a replica on a real vLLM, at every step of an apply: it comes back at a checked version."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.vllm.parts import make_chain, reference_tokens

REPOSITORY = Path(__file__).parents[2]
KILL_POINTS = ("staged", "withdrawn", "0", "9", "24", "written", "proven")


def test_a_replica_killed_at_any_step_comes_back_at_a_checked_version(tmp_path: Path) -> None:
    made = make_chain(tmp_path, "qwen3", num_versions=2)
    # In one process, so that one SIGKILL takes the replica, vLLM's core and its worker.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    killed = subprocess.run(
        [sys.executable, "-m", "tests.vllm.killed", str(tmp_path), made.chain.url, *KILL_POINTS],
        cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip
    assert killed.returncode == 0, killed.stderr[-5000:]
    told = [json.loads(line) for line in killed.stdout.splitlines() if line.startswith('{"kill_point"')]
    assert [one["kill_point"] for one in told] == list(KILL_POINTS)
    base, tip = ([list(tokens) for tokens in reference_tokens(folder)] for folder in made.folders)
    for one in told:
        expected = "checked" if one["kill_point"] == "staged" else "moving"
        assert (one["mark"]["status"], one["mark"]["version"]) == (expected, 0)
        assert one["version"] == 0
        assert one["tokens"] == base
        assert one["later"] == tip
