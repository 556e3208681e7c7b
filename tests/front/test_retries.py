"""Replicas that fail: servers that break off, are busy or behind, and real replicas that are killed."""

from __future__ import annotations

import itertools
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.front.fronts import running_front, status, up
from tests.front.test_front import complete
from tests.http_server import QuietHandler, listening
from tests.serving.model_chains import ModelChain, make_chain
from tests.serving.servers import running_replica
from tests.waiting import wait_until

CHAIN = "memory://front-before-scripts"


class Scripted(QuietHandler):
    """A server that looks like a replica, and answers POST by its script."""

    name: str
    chain: str
    version: int
    script: Iterator[str]
    asked: list[str]
    release: threading.Event

    def do_GET(self) -> None:  # noqa: N802 - http.server's names
        if self.path.startswith("/weightline/status"):
            self._answer(200, {"replica": self.name, "chain": self.chain})
            return
        time.sleep(0.05)
        self._answer(200, {"version": self.version, "commit_id": None, "moving_to": None, "last_error": None})

    def do_POST(self) -> None:  # noqa: N802
        self.rfile.read(int(self.headers["content-length"]))
        self.asked.append(self.name)
        step = next(self.script)
        if step == "answer":
            self._answer(200, {"text": self.name})
        elif step == "behind":
            self._answer(409, {"error": {"code": "version-not-served"}}, version=self.version)
        elif step == "conflict":
            self._answer(409, {"error": {"code": "conflict"}})
        elif step == "hang up":
            self.cut()
        elif step == "break off":
            self._begin(200, "application/json", 100)
            self.wfile.write(b'{"text"')
            self.cut()
        elif step == "stream":
            self._begin(200, "text/event-stream", None)
            for chunk in (b"data: 1\n\n", b"data: 2\n\n"):
                self.wfile.write(b"%x\r\n%s\r\n" % (len(chunk), chunk))
                self.wfile.flush()
                self.release.wait(30)
            self.wfile.write(b"0\r\n\r\n")
        elif step == "cut stream":
            self._begin(200, "text/event-stream", None)
            self.wfile.write(b"9\r\ndata: 1\n\n\r\n")
            self.cut()
        elif step == "hold":
            self.release.wait(60)
            self.cut()
        else:
            self._answer(int(step), {"error": {"code": step}})

    def _begin(self, code: int, kind: str, length: int | None) -> None:
        self.send_response(code)
        self.send_header("content-type", kind)
        if length is None:
            self.send_header("transfer-encoding", "chunked")
        else:
            self.send_header("content-length", str(length))
        self.end_headers()

    def _answer(self, code: int, body: dict[str, Any], version: int | None = None) -> None:
        raw = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(raw)))
        if version is not None:
            self.send_header("x-weightline-version", str(version))
        self.end_headers()
        self.wfile.write(raw)


@contextmanager
def scripted(tmp_path: Path, *scripts: str, retry_seconds: float = 30.0) -> Iterator[tuple[str, list[str]]]:
    """Yields the URL of a front, and the list to which the servers behind it append as they are asked.

    Each server goes on with the last step of its script.
    """
    asked: list[str] = []
    release = threading.Event()
    with ExitStack() as servers:
        urls = []
        for number, script in enumerate(scripts):
            steps = [step.strip() for step in script.split(",")]
            bound = {"script": itertools.chain(steps, itertools.repeat(steps[-1])), "asked": asked, "chain": CHAIN}
            port = servers.enter_context(
                listening(Scripted, name=str(number), version=number, release=release, **bound)
            )
            urls.append(f"http://127.0.0.1:{port}")
        try:
            with running_front(
                CHAIN, tmp_path / "front", len(urls), replica_urls=tuple(urls), retry_seconds=retry_seconds
            ) as url:
                yield url, asked
        finally:
            release.set()


@pytest.mark.parametrize("failure", ["503", "502", "504", "429", "hang up", "break off", "behind"])
def test_a_request_that_one_cannot_answer_is_answered_elsewhere(failure: str, tmp_path: Path) -> None:
    with scripted(tmp_path, failure, "answer") as (url, asked):
        for number in range(16):
            answer = complete(url, f"prompt {number}")
            assert answer.status_code == 200
            assert answer.json() == {"text": "1"}
        assert "0" in asked
        retries = status(url)["retries"]
    reason = {"hang up": "unreachable", "break off": "unreachable", "behind": "behind"}.get(failure, "busy")
    assert retries == {"total": asked.count("0"), reason: asked.count("0")}


def test_each_replica_is_asked_once_before_any_is_asked_again(tmp_path: Path) -> None:
    with scripted(tmp_path, "503, answer", "503, answer", "503, answer") as (url, asked):
        assert complete(url).status_code == 200
    assert len(set(asked[:3])) == 3
    assert len(asked) == 4


def test_when_all_are_busy_the_last_answer_is_passed_on(tmp_path: Path) -> None:
    with scripted(tmp_path, "503", "503", retry_seconds=0.5) as (url, asked):
        refused = complete(url)
    assert refused.status_code == 503
    assert refused.json() == {"error": {"code": "503"}}
    assert set(asked) == {"0", "1"}


@pytest.mark.parametrize("code", ["400", "404", "conflict", "500"])
def test_other_errors_are_passed_on_at_once(code: str, tmp_path: Path) -> None:
    with scripted(tmp_path, code, code) as (url, asked):
        refused = complete(url)
    assert refused.status_code == (409 if code == "conflict" else int(code))
    assert len(asked) == 1


def test_a_stream_is_passed_on_as_it_comes_and_cut_where_it_breaks_off(tmp_path: Path) -> None:
    with scripted(tmp_path, "stream, cut stream") as (url, _):
        with httpx.stream("POST", f"{url}/v1/completions", json={"prompt": "a"}, trust_env=False) as answer:
            assert answer.headers["content-type"] == "text/event-stream"
            # The server sends its second event half a minute later.
            events = answer.iter_bytes()
            assert next(events) == b"data: 1\n\n"
            assert status(url)["replicas"][0]["in_flight"] == 1
        wait_until(lambda: status(url)["replicas"][0]["in_flight"] == 0)
        with httpx.stream("POST", f"{url}/v1/completions", json={"prompt": "a"}, trust_env=False) as answer:
            events = answer.iter_bytes()
            assert next(events) == b"data: 1\n\n"
            with pytest.raises(httpx.RemoteProtocolError):
                next(events)


def test_the_request_of_a_client_that_leaves_is_given_up(tmp_path: Path) -> None:
    with scripted(tmp_path, "hold") as (url, asked):
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{url}/v1/completions", json={"prompt": "a"}, timeout=0.5, trust_env=False)
        wait_until(lambda: status(url)["replicas"][0]["in_flight"] == 0)
        assert asked == ["0"]


@pytest.mark.nightly
@pytest.mark.process
def test_no_client_sees_that_a_replica_stops_answering_or_is_killed(tmp_path: Path) -> None:
    grown = make_chain(f"file://{tmp_path}/chain", num_versions=2)
    with ExitStack() as running:
        process = running.enter_context(_process(grown, tmp_path, "falls"))
        running.enter_context(running_replica(grown.chain, tmp_path / "stays", "stays", version=1))
        url = running.enter_context(running_front(grown.chain.url, tmp_path / "front", num_up=2))
        ending = threading.Event()
        with ThreadPoolExecutor(4) as pool:
            clients = [pool.submit(_keep_asking, url, number, ending) for number in range(4)]
            try:
                _wait_for_answers(url, 20)
                process.send_signal(signal.SIGSTOP)  # it takes connections, and answers nothing
                wait_until(lambda: up(url).keys(), lambda names: names == {"stays"})
                _wait_for_answers(url, 20)
                process.send_signal(signal.SIGCONT)
                wait_until(lambda: len(up(url)), lambda num: num == 2)
                _wait_for_answers(url, 20)
                process.kill()
                wait_until(lambda: up(url).keys(), lambda names: names == {"stays"})
                _wait_for_answers(url, 20)
                running.enter_context(_process(grown, tmp_path, "falls"))
                wait_until(lambda: len(up(url)), lambda num: num == 2)
                _wait_for_answers(url, 20)
            finally:
                ending.set()
        answers = [answer for client in clients for answer in client.result()]
    texts: dict[str, set[str]] = {}
    for prompt, code, text in answers:
        assert code == 200
        texts.setdefault(prompt, set()).add(text)
    assert all(len(found) == 1 for found in texts.values())


def _keep_asking(url: str, client: int, ending: threading.Event) -> list[tuple[str, int, str]]:
    """Sends requests one after the other. Returns each prompt, status and text."""
    answers = []
    for number in itertools.count():
        if ending.is_set():
            return answers
        prompt = f"prompt {client} {number % 8}"
        answer = complete(url, prompt)
        answers.append((prompt, answer.status_code, answer.json()["choices"][0]["text"]))
    return answers


def _wait_for_answers(url: str, num: int) -> None:
    before = status(url)["requests"]
    wait_until(lambda: status(url)["requests"], lambda now: now >= before + num)


@contextmanager
def _process(grown: ModelChain, folder: Path, name: str) -> Iterator[subprocess.Popen[bytes]]:
    """A replica as a process of its own, at the tip."""
    argv = [sys.executable, "-m", "weightline", "serve", "transformers", "--follow", grown.chain.url, "--name", name]
    argv += ["--state-dir", str(folder / name), "--port", "0", "--every", "1", "--lease", "600"]
    (folder / name).mkdir(exist_ok=True)
    with (folder / f"{name}.log").open("ab") as log:
        process = subprocess.Popen(argv, stdout=log, stderr=subprocess.STDOUT)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
