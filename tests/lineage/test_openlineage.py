"""What a company's lineage tool hears of a chain, through openlineage-python's own transports."""

from __future__ import annotations

import json
import logging
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.chains import commit_state, nudged, random_state
from weightline.chain import Chain, open_chain
from weightline.chain.read.records import EVALUATIONS, write_record
from weightline.chain.write.standalone import commit_fork
from weightline.lineage.openlineage import dataset_name, export_version, is_enabled, try_export, version_events


@pytest.fixture
def chain(tmp_path: Path) -> Chain:
    """Two versions; the second was measured on one task and passed over on another."""
    chain = open_chain((tmp_path / "bucket" / "my model").as_uri())
    state = random_state(0)
    commit_state(chain, state, is_milestone=True)
    commit_state(chain, nudged(state, 1), state, stage="dpo")
    write_record(chain, EVALUATIONS, 1, "arithmetic", {"status": "done", "score": 0.5, "metrics": {"exact": 0.5}})
    write_record(chain, EVALUATIONS, 1, "later", {"status": "skipped", "newer_version": 2})
    return chain


@pytest.fixture
def received(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """The events that a lineage server on this machine was sent."""
    events: list[dict[str, Any]] = []

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            events.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(201)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Receiver) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setenv("OPENLINEAGE_URL", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield events
        server.shutdown()
        thread.join()


def test_nothing_is_told_unless_the_environment_says_where_to(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENLINEAGE_URL", "OPENLINEAGE_CONFIG", "OPENLINEAGE__TRANSPORT__TYPE"):
        monkeypatch.delenv(name, raising=False)
        assert is_enabled({name: "x"})
        assert not is_enabled({name: "x", "OPENLINEAGE_DISABLED": "true"})
    assert not is_enabled({})
    assert export_version(chain, 1) == 0


def test_a_commit_and_its_evaluations_arrive(chain: Chain, received: list[dict[str, Any]]) -> None:
    assert export_version(chain, 1) == 3
    commit, measured, passed_over = received
    name = str(Path(chain.url.removeprefix("file://").replace("%20", " ")))
    assert commit["eventType"] == "COMPLETE"
    assert commit["eventTime"] == chain.manifest(1).created_at
    assert commit["job"]["name"] == "my model.dpo"
    (read,), (made,) = commit["inputs"], commit["outputs"]
    assert (read["namespace"], read["name"]) == (made["namespace"], made["name"]) == ("file", name)
    assert read["facets"]["version"]["datasetVersion"] == "0"
    assert made["facets"]["version"]["datasetVersion"] == "1"
    assert made["outputFacets"]["outputStatistics"]["size"] == chain.manifest(1).payload_nbytes
    facts = commit["run"]["facets"]["weightline_commit"]
    assert (facts["commitId"], facts["kind"]) == (chain.manifest(1).commit_id, "delta")
    assert (measured["eventType"], passed_over["eventType"]) == ("COMPLETE", "ABORT")
    assert measured["run"]["facets"]["weightline_evaluation"]["score"] == 0.5
    assert measured["inputs"][0]["facets"]["version"]["datasetVersion"] == "1"


def test_telling_again_tells_of_the_same_runs(chain: Chain) -> None:
    first, second = ([event.run.runId for event in version_events(chain, 1)] for _ in range(2))
    assert first == second
    assert len(set(first)) == 3


def test_a_fork_comes_from_its_origin_and_an_anchor_from_nothing(chain: Chain, tmp_path: Path) -> None:
    fork = open_chain((tmp_path / "fork").as_uri())
    commit_fork(chain, 1, fork)
    (commit,) = version_events(fork, 0)
    (origin,) = commit.inputs
    assert (origin.namespace, origin.name) == dataset_name(chain.url)
    (first,) = version_events(chain, 0)
    assert first.inputs == []


def test_datasets_are_named_as_others_name_them() -> None:
    assert dataset_name("s3://bucket/models/a") == ("s3://bucket", "models/a")
    assert dataset_name("file:///data/my%20model") == ("file", "/data/my model")
    assert dataset_name("/data/model") == ("file", "/data/model")


def test_a_lineage_server_that_is_away_fails_nothing(
    chain: Chain, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("OPENLINEAGE__TRANSPORT__TYPE", "http")
        monkeypatch.setenv("OPENLINEAGE__TRANSPORT__URL", f"http://127.0.0.1:{closed.getsockname()[1]}")
        monkeypatch.setenv("OPENLINEAGE__TRANSPORT__RETRY", '{"total": 0}')
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        with caplog.at_level(logging.WARNING, "test"):
            try_export(chain, 0, logging.getLogger("test"))
    assert "no OpenLineage events of version 0" in caplog.text
