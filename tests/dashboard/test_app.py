"""The server's answers: documents, errors that say what is wrong, and headers that keep a page to itself."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from tests.chains import commit_state, random_state
from tests.dashboard.conftest import served
from tests.waiting import PATIENCE_SECONDS
from weightline.chain import Chain, open_chain
from weightline.chain.read.records import SAMPLES, write_record
from weightline.cli.main import app
from weightline.dashboard.buckets import chain_id
from weightline.dashboard.serve import allowed_hosts
from weightline.errors import InputError
from weightline.format import keys
from weightline.rollouts.record import Completion, Group, ReplicaWork, SamplesRecord, Spread, record_name
from weightline.rollouts.sample import Span


@pytest.fixture
def api(demo: tuple[Chain, Chain], demo_url: str) -> Iterator[httpx.Client]:
    """The demo chain's documents, once it was read."""
    with httpx.Client(base_url=f"{demo_url}/api/", trust_env=False, timeout=PATIENCE_SECONDS) as client:
        while any(card["state"] == "loading" for card in client.get("chains").json()["chains"]):
            time.sleep(0.05)
        client.base_url = client.base_url.join(f"chains/{chain_id(demo[0])}/")
        yield client


def test_a_version_and_a_comparison(api: httpx.Client) -> None:
    told = api.get("versions/25").json()
    assert (told["version"], told["stage"], told["score"]) == (25, "grpo", 0.844)
    assert told["refs"] == ["best"]
    assert len(told["layers"]["layers"]) == 16
    compared = api.get("compare", params={"a": 25, "b": 28}).json()
    assert compared["is_same_state"]
    counted = api.get("differing", params={"a": 24, "b": 25}).json()
    assert counted["num_changed"] == told["num_changed"]
    assert counted["num_elements"] == told["num_elements"]


def test_the_samples_of_a_version_are_read_from_its_record(tmp_path: Path) -> None:
    chain = open_chain((tmp_path / "chain").as_uri())
    commit_state(chain, random_state(0))
    groups = (Group("2+3=", (Completion("<b>5</b>", 1.0, (Span(4, 2), Span(5, 1))),), 8),)
    record = SamplesRecord(
        7, Spread(1.5, None, 2.0), made_by={4: 6}, replicas={"r": ReplicaWork(6, 2.0)}, groups=groups
    )
    write_record(chain, SAMPLES, 0, record_name("grpo", 7), record.to_record())
    with served([chain.url]) as url, httpx.Client(base_url=url, trust_env=False, timeout=PATIENCE_SECONDS) as http:
        versions = f"/api/chains/{chain_id(chain)}/versions"
        told = http.get(f"{versions}/0/rollouts").json()
        assert http.get(f"{versions}/1/rollouts").json() == {"samples": None, "problems": []}
        assert http.get(f"{versions}/-1/rollouts").status_code == 400
        chain.store.put(keys.record(SAMPLES, 1, "grpo-8"), b"{")
        (problem,) = http.get(f"{versions}/1/rollouts").json()["problems"]
    assert "grpo-8.json" in problem
    assert told["problems"] == []
    samples = told["samples"]
    assert (samples["num_samples"], samples["made_by"]) == (6, [{"version": 4, "num_samples": 6}])
    assert samples["replicas"] == [{"name": "r", "num_samples": 6, "seconds": 2.0, "samples_per_second": 3.0}]
    assert samples["staleness"] == {"mean": 1.5, "min": None, "max": 2.0}
    (group,) = samples["groups"]
    assert group["completions"] == [{"text": "<b>5</b>", "reward": 1.0, "spans": [[4, 2], [5, 1]]}]
    assert (group["prompt"], group["num_completions"]) == ("2+3=", 8)


def test_what_is_not_there_is_told_as_such(api: httpx.Client, demo_url: str) -> None:
    missing = api.get("versions/99")
    assert missing.status_code == 404
    assert missing.json()["error"]["kind"] == "version-not-found"
    assert httpx.get(f"{demo_url}/api/chains/nothing/glance", trust_env=False).status_code == 404
    for path in ("versions/x", "series"):
        refused = api.get(path)
        assert (refused.status_code, refused.json()["error"]["kind"]) == (400, "input")
    assert api.get("window", params={"first": 0, "last": 10**9}).json()["last"] == 499


def test_broken_and_unreachable_chains_never_end_in_a_server_error(broken: Chain, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with served([broken.url, (tmp_path / "file").as_uri()]) as url, httpx.Client(base_url=url, trust_env=False) as http:
        chains = http.get("/api/chains").json()["chains"]
        first = f"/api/chains/{chains[0]['id']}"
        broken_version, gone = http.get(f"{first}/versions/2"), http.get(f"{first}/versions/4")
        assert (broken_version.status_code, gone.status_code) == (502, 404)
        assert broken_version.json()["error"]["kind"] == "manifest"
        assert http.get(f"{first}/versions/3").json()["layers"] is None
        away = http.get(f"/api/chains/{chains[1]['id']}/versions/0")
        assert away.status_code == 502
        assert "Not a directory" in away.json()["error"]["message"]


def test_answers_are_hardened_and_only_for_this_host(demo_url: str) -> None:
    for path in ("/", "/static/js/main.js", "/api/chains"):
        headers = httpx.get(f"{demo_url}{path}", trust_env=False).headers
        assert "default-src 'self'" in headers["content-security-policy"]
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
    rebound = httpx.get(f"{demo_url}/api/chains", headers={"host": "evil.example"}, trust_env=False)
    assert rebound.status_code == 400
    assert httpx.post(f"{demo_url}/api/chains", trust_env=False).status_code == 405
    assert httpx.get(f"{demo_url}/static/../app.py", trust_env=False).status_code == 404
    assert "evil.example" not in allowed_hosts("127.0.0.1")
    assert allowed_hosts("0.0.0.0") == ("*",)


def test_nothing_is_loaded_from_elsewhere() -> None:
    static = Path(__file__).resolve().parents[2] / "weightline" / "dashboard" / "static"
    own = [path for path in static.rglob("*") if path.suffix in (".js", ".css", ".html") and "vendor" not in path.parts]
    assert len(own) > 10
    for path in own:
        text = path.read_text().replace("http://www.w3.org/", "")
        assert "http://" not in text, path
        assert "https://" not in text, path
        assert "innerHTML" not in text, path
        assert text.isascii(), path
    for folder in (path for path in (static / "vendor").iterdir() if path.is_dir()):
        assert (folder / "LICENSE").read_text()


def test_changes_are_streamed(demo_url: str, demo: tuple[Chain, Chain]) -> None:
    with httpx.stream("GET", f"{demo_url}/api/events", trust_env=False, timeout=PATIENCE_SECONDS) as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        line = next(line for line in stream.iter_lines() if line.startswith("data: "))
    assert json.loads(line.removeprefix("data: ")).keys() == {chain_id(chain) for chain in demo}


@pytest.mark.process
def test_the_verb_serves_until_it_is_interrupted(broken: Chain) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    argv = [sys.executable, "-m", "weightline.cli.main", "dashboard", broken.url, "--port", port]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert url == f"http://127.0.0.1:{port}"
        try:
            with httpx.Client(base_url=url, trust_env=False, transport=httpx.HTTPTransport(retries=10)) as http:
                assert http.get("/api/chains").json()["chains"][0]["url"] == broken.url
                with http.stream("GET", "/api/events", timeout=PATIENCE_SECONDS) as stream:
                    lines = stream.iter_lines()
                    assert next(lines) == "retry: 2000"
                    process.terminate()
                    assert all(line == "" or line.startswith("data: ") for line in lines)
            assert process.wait(timeout=PATIENCE_SECONDS) == 128 + signal.SIGTERM
        finally:
            process.kill()


@pytest.mark.parametrize("host", ["127.0.0.1", "no.such.host.invalid"])
def test_an_address_that_cannot_be_had_is_one_clear_error(host: str, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        result = CliRunner().invoke(app, ["dashboard", str(tmp_path), "--host", host, "--port", port])
    assert isinstance(result.exception, InputError)
    assert f"port: cannot listen on {host}:{port}" in str(result.exception)
    assert "http://" not in result.output


def test_a_url_that_no_store_has_is_one_clear_error() -> None:
    result = CliRunner().invoke(app, ["dashboard", "gopher://hole"])
    assert isinstance(result.exception, InputError)
    assert "no store for gopher" in str(result.exception)
