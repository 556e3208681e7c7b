"""The soak of tests/chain/soak.py: five minutes in `make test-nightly`, some seconds in `make test`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

_SECONDS = 300 if os.environ.get("HYPOTHESIS_PROFILE") == "nightly" else 5


@pytest.mark.process
@pytest.mark.timeout(_SECONDS * 5 + 600)
def test_no_kept_version_is_lost_or_changed_whatever_is_killed(tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "tests.chain.soak", str(tmp_path), str(_SECONDS)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["findings"] == [], seen
    assert seen["foreign"] == [], seen
    assert seen["errors"] == [], seen
    assert seen["kept"], seen
