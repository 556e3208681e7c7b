"""The inference server of a local stack, served by vLLM: `weightline up --engine vllm`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.vllm.parts import make_chain
from weightline.fleet.local_replica import REPLICA_PYTHON_VARIABLE, REPLICAS_DIR_VARIABLE, end_replicas
from weightline.fleet.members import SERVING_URL_VARIABLE, find_fleet
from weightline.launch.replica import VLLM_PYTHON_VARIABLE, require_vllm_python
from weightline.serving.http import client


def test_a_stack_serves_by_vllm_where_it_is_told_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VLLM_PYTHON_VARIABLE, sys.executable)
    chain = make_chain(tmp_path, "qwen3", num_versions=2).chain
    monkeypatch.delenv(SERVING_URL_VARIABLE, raising=False)
    monkeypatch.setenv(REPLICAS_DIR_VARIABLE, str(tmp_path / "replicas"))
    monkeypatch.setenv(REPLICA_PYTHON_VARIABLE, str(require_vllm_python()))
    try:
        (replica,) = find_fleet(chain).reached
        for version in (0, 1):
            assert client.refresh(replica.url, replica.token, version).version == version
        status = client.status(replica.url)
        assert (status.engine, status.version) == ("vllm", 1)
    finally:
        end_replicas(tmp_path / "replicas")
