"""A server process as a person starts it: before the chain has a version, during refreshes, and after a restart."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.serving.model_chains import ModelChain, make_chain
from tests.waiting import PATIENCE_SECONDS, wait_until
from weightline.chain.files.checkpoint import write_checkpoint
from weightline.chain.read.leases import live_leases
from weightline.errors import ApplyError, InputError, VersionNotFoundError
from weightline.serving.engines.base import GenerationRequest
from weightline.serving.engines.transformers import TransformersEngine
from weightline.serving.http import client
from weightline.serving.http.auth import read_token
from weightline.serving.http.server import ServerSettings, serve
from weightline.serving.replica.replica import Replica

pytestmark = pytest.mark.process

REPOSITORY = Path(__file__).parents[3]
NUM_REFRESHES = 20
PROMPT = "12+34="


@contextmanager
def running_server(
    chain_url: str, state_dir: Path, *options: str, ends_by: signal.Signals = signal.SIGTERM
) -> Iterator[str]:
    """The server's URL. Ends it by a signal and checks that it left in order."""
    argv = [sys.executable, "-m", "weightline", "serve", "transformers", "--follow", chain_url]
    argv += ["--state-dir", str(state_dir), "--port", "0"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment.pop("WEIGHTLINE_TOKEN", None)
    process = subprocess.Popen([*argv, *options], cwd=REPOSITORY, env=environment)
    try:
        address = state_dir / "address.json"
        wait_until(lambda: address.exists() or process.poll() is not None)
        told = json.loads(address.read_text())
        assert told["pid"] == process.pid
        assert told["host"] == "127.0.0.1"
        yield told["url"]
        process.send_signal(ends_by)
        assert process.wait(PATIENCE_SECONDS) == 0
        assert not address.exists()
    finally:
        process.kill()
        process.wait()


def _complete(url: str) -> httpx.Response:
    body = {"prompt": PROMPT, "max_tokens": 12, "temperature": 0}
    return httpx.post(f"{url}/v1/completions", json=body, timeout=PATIENCE_SECONDS, trust_env=False)


@dataclass(frozen=True)
class Following:
    """A server that follows a chain, started before the chain had a version."""

    url: str
    token: str
    state_dir: Path
    grown: ModelChain


@pytest.fixture(scope="module")
def following(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Following]:
    folder = tmp_path_factory.mktemp("following")
    grown = make_chain((folder / "bucket").as_uri(), num_versions=0)
    state_dir = folder / "state"
    with running_server(grown.chain.url, state_dir, "--every", "0.1", "--name", "r-7") as url:
        wait_until(lambda: _answers(url))
        yield Following(url, read_token(state_dir / "token"), state_dir, grown)


def test_a_server_waits_for_the_first_version_and_follows_the_chain(following: Following) -> None:
    url, grown = following.url, following.grown
    assert client.status(url).state == "waiting"
    assert client.status(url).replica == "r-7"
    assert _complete(url).status_code == 503
    for version in (0, 1):
        grown.grow()
        wait_until(lambda expected=version: client.status(url).version == expected)
        assert _complete(url).json()["weightline_version"] == version


def test_errors_arrive_as_their_types(following: Following) -> None:
    with pytest.raises(InputError, match="token"):
        client.refresh(following.url, "wrong")
    with pytest.raises(VersionNotFoundError, match="has no version 999"):
        client.refresh(following.url, following.token, 999)
    with pytest.raises(ApplyError, match="check that it runs"):
        client.status("http://127.0.0.1:1")


def test_a_state_folder_serves_one_process(following: Following) -> None:
    with pytest.raises(InputError, match="in use by another replica"):
        serve(ServerSettings(following.grown.chain.url, following.state_dir, port=0))


def test_a_server_that_is_ended_while_it_starts_leaves_in_order(tmp_path: Path) -> None:
    with running_server((tmp_path / "bucket").as_uri(), tmp_path / "state"):
        pass  # it has told where it listens, and still imports and loads


def test_no_request_fails_or_mixes_versions_during_many_refreshes(following: Following, tmp_path: Path) -> None:
    url, grown = following.url, following.grown
    if not grown.states:
        grown.grow()
    client.refresh(url, following.token)
    is_over = threading.Event()
    askers = [_Asker(url, is_over) for _ in range(3)]
    for _ in range(NUM_REFRESHES):
        version = grown.grow().version
        assert client.refresh(url, following.token, version).version == version
        time.sleep(0.05)
    is_over.set()
    for asker in askers:
        asker.join(60)
    answers = [answer for asker in askers for answer in asker.answers]
    assert {status for status, _ in answers} == {200}
    expected = [_greedy_text(grown, version, tmp_path) for version in range(len(grown.states))]
    assert len(set(expected)) > len(expected) * 0.9, "texts must tell versions apart"
    for _, told in answers:
        assert told["choices"][0]["text"] == expected[told["weightline_version"]]
    assert len({told["weightline_version"] for _, told in answers}) > NUM_REFRESHES * 0.5


def test_a_restarted_server_comes_back_to_its_version_and_not_to_the_tip(tmp_path: Path) -> None:
    grown = make_chain((tmp_path / "bucket").as_uri(), num_versions=3)
    before = Replica(grown.chain, TransformersEngine("cpu"), tmp_path / "state", "replica-0")
    before.refresh(1)
    with running_server(grown.chain.url, tmp_path / "state", "--every", "0", ends_by=signal.SIGINT) as url:
        wait_until(lambda: _answers(url) and client.status(url).version is not None)
        assert client.status(url).version == 1
        assert client.refresh(url, read_token(tmp_path / "state" / "token")).version == 2
        wait_until(lambda: [lease.version for lease in live_leases(grown.chain)] == [2])
        (lease,) = live_leases(grown.chain)
        assert (lease.url, lease.version, lease.pid != os.getpid()) == (url, 2, True)
    assert live_leases(grown.chain) == (), "it left in order, and said so"


def _answers(url: str) -> bool:
    try:
        return client.status(url).replica != ""
    except ApplyError:
        return False


class _Asker(threading.Thread):
    """Asks the same question again and again."""

    def __init__(self, url: str, is_over: threading.Event) -> None:
        super().__init__(daemon=True)
        self.url, self.is_over = url, is_over
        self.answers: list[tuple[int, dict[str, Any]]] = []
        self.start()

    def run(self) -> None:
        while not self.is_over.is_set():
            answer = _complete(self.url)
            self.answers.append((answer.status_code, answer.json()))


def _greedy_text(grown: ModelChain, version: int, tmp_path: Path) -> str:
    """What a freshly loaded model of the version says."""
    folder = tmp_path / f"fresh-{version}"
    write_checkpoint(grown.chain, version, folder)
    engine = TransformersEngine("cpu")
    engine.load(folder)
    engine.set_version(version)
    return engine.generate(GenerationRequest((PROMPT,), max_tokens=12)).completions[0].text
