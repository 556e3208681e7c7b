"""What the flows do with OpenLineage: tell it, and never fail for it."""

from __future__ import annotations

import logging
import socket

import pytest

from tests.chains import commit_state, random_state
from weightline.chain import open_chain
from weightline.tasks import lineage


def test_a_lineage_server_that_is_away_fails_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    chain = open_chain("memory://openlineage-away")
    commit_state(chain, random_state(0))
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("OPENLINEAGE__TRANSPORT__TYPE", "http")
        monkeypatch.setenv("OPENLINEAGE__TRANSPORT__URL", f"http://127.0.0.1:{closed.getsockname()[1]}")
        monkeypatch.setenv("OPENLINEAGE__TRANSPORT__RETRY", '{"total": 0}')
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setattr(lineage, "get_run_logger", lambda: logging.getLogger("test"))
        with caplog.at_level(logging.WARNING, "test"):
            lineage._export(chain, 0)
    assert "no OpenLineage events of version 0" in caplog.text
