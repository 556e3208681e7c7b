"""These tests drive a real vLLM. `make test-vllm` builds an environment that has one."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

HAS_VLLM = importlib.util.find_spec("vllm") is not None

if HAS_VLLM:
    # Read when vLLM is imported, also by the processes that it starts. Not for other tests of the same session.
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if not item.path.is_relative_to(here):
            continue
        # vLLM and its hundred dependencies warn of many things, which are theirs.
        item.add_marker(pytest.mark.filterwarnings("ignore"))
        item.add_marker(pytest.mark.process)
        if not HAS_VLLM:
            item.add_marker(pytest.mark.skip(reason="vLLM is not installed here: make test-vllm installs and runs it"))
