"""`weightline serve vllm`, as a person starts it: answers during refreshes, versions in answers, authentication."""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.vllm.parts import MAX_TOKENS, PROMPTS, FolderChain, make_chain, reference_tokens
from tests.waiting import PATIENCE_SECONDS, wait_until
from weightline.serving.engines.vllm.serve import REFUSED_CONFIG, REFUSED_OPTIONS
from weightline.serving.http import client
from weightline.serving.http.auth import read_token

REPOSITORY = Path(__file__).parents[2]
NUM_REFRESHES = 20
VLLM_OPTIONS = (
    "--enforce-eager",
    "--max-model-len",
    "256",
    "--max-num-seqs",
    "8",
    "--kv-cache-memory-bytes",
    "67108864",
)


@dataclass(frozen=True)
class Serving:
    url: str
    token: str
    made: FolderChain
    process: subprocess.Popen[bytes]


@contextmanager
def serving(made: FolderChain, state_dir: Path, *options: str) -> Iterator[Serving]:
    """The server, ended with SIGTERM, in order."""
    argv = [sys.executable, "-m", "weightline.cli.main", "serve", "vllm", "tiny", "--follow", made.chain.url]
    argv += ["--state-dir", str(state_dir), "--port", "0", *options, *VLLM_OPTIONS]
    # The development routes are there, so that it shows whether they are guarded.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "VLLM_SERVER_DEV_MODE": "1"}
    environment.pop("WEIGHTLINE_TOKEN", None)
    process = subprocess.Popen(
        argv, cwd=REPOSITORY, env=environment, start_new_session=True, preexec_fn=_end_with_parent
    )
    try:
        address = state_dir / "address.json"
        wait_until(lambda: _told(address).get("pid") == process.pid or process.poll() is not None)
        url = _told(address)["url"]
        wait_until(lambda: _is_up(url) or process.poll() is not None)
        assert process.poll() is None
        yield Serving(url, read_token(state_dir / "token"), made, process)
        if process.poll() is None:
            process.terminate()
            assert process.wait(60) in (0, -15)
    finally:
        try:
            os.killpg(process.pid, 9)
        except ProcessLookupError:
            pass
        process.wait()


def _end_with_parent() -> None:
    """In the child: SIGTERM when the tests' process is gone, however it went. Linux only; elsewhere nothing."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(1, signal.SIGTERM)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    folder = tmp_path_factory.mktemp("server")
    made = make_chain(folder, "qwen3", num_versions=2)
    with serving(made, folder / "state", "--every", "0") as running:
        yield running


def _told(address: Path) -> dict[str, Any]:
    """What is told of where a server listens; a killed one's word stands until the next one starts."""
    return json.loads(address.read_text()) if address.exists() else {}


def _is_up(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=5, trust_env=False).is_success
    except httpx.HTTPError:
        return False


def _complete(
    url: str,
    prompt: str = PROMPTS[0],
    headers: dict[str, str] | None = None,
    path: str = "/v1/completions",
    **fields: Any,
) -> httpx.Response:
    body = {
        "model": "tiny", "prompt": list(prompt.encode()), "max_tokens": MAX_TOKENS, "min_tokens": MAX_TOKENS,
        "temperature": 0, "ignore_eos": True, "return_token_ids": True,
    }  # fmt: skip
    return httpx.post(url + path, json=body | fields, headers=headers, timeout=PATIENCE_SECONDS, trust_env=False)


def _tokens(answer: httpx.Response) -> tuple[int, ...]:
    return tuple(answer.json()["choices"][0]["token_ids"])


def test_nothing_is_answered_before_a_version_is_checked(server: Serving) -> None:
    refused = _complete(server.url)
    assert refused.status_code == 503
    assert refused.headers["retry-after"] == "1"
    facts = client.refresh(server.url, server.token, 0)
    assert facts.version == 0
    answer = _complete(server.url)
    assert (answer.status_code, answer.headers["x-weightline-version"]) == (200, "0")
    assert _tokens(answer) == reference_tokens(server.made.folders[0], PROMPTS[:1])[0]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/collective_rpc"), ("POST", "/pause"), ("POST", "/update_weights"), ("POST", "/reset_prefix_cache"),
        ("POST", "/v1/load_lora_adapter"), ("GET", "/openapi.json"), ("GET", "/server_info"),
        ("PUT", "/v1/completions"),
        ("POST", "//v1/completions"), ("POST", "/weightline/refresh"),
    ],
)  # fmt: skip
def test_every_route_but_the_public_ones_needs_the_token(server: Serving, method: str, path: str) -> None:
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": server.token}):
        answer = httpx.request(
            method, server.url + path, json={}, headers=headers, timeout=PATIENCE_SECONDS, trust_env=False
        )
        assert answer.status_code == 401, answer.text
    for path in ("/health", "/metrics", "/v1/models", "/weightline/status", "/weightline/metrics"):
        assert httpx.get(server.url + path, timeout=PATIENCE_SECONDS, trust_env=False).status_code == 200


class Asker(threading.Thread):
    """Asks again and again: whole answers, streams, prompts that stand in the prefix cache; one by another route."""

    def __init__(self, server: Serving, number: int, is_over: threading.Event) -> None:
        super().__init__(daemon=True)
        self.url, self.number, self.is_over = server.url, number, is_over
        self.way: dict[str, Any] = {}
        if number == 2:
            self.way = {"path": "/invocations", "headers": {"authorization": f"Bearer {server.token}"}}
        self.answers: list[tuple[int, str, str, tuple[int, ...]]] = []
        self.start()

    def run(self) -> None:
        while not self.is_over.is_set():
            prompt = PROMPTS[(self.number + len(self.answers)) % len(PROMPTS)]
            answer = _complete(self.url, prompt, stream=self.number % 2 == 1, **self.way)
            tokens = _streamed(answer) if self.number % 2 else _tokens(answer) if answer.is_success else ()
            version = answer.headers.get("x-weightline-version", "none")
            self.answers.append((answer.status_code, version, prompt, tokens))


def _streamed(answer: httpx.Response) -> tuple[int, ...]:
    chunks = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
    return tuple(token for chunk in chunks for token in chunk["choices"][0].get("token_ids") or ())


def test_no_request_fails_or_mixes_versions_during_many_refreshes(server: Serving) -> None:
    made = server.made
    client.refresh(server.url, server.token)
    is_over = threading.Event()
    askers = [Asker(server, number, is_over) for number in range(4)]
    pauses = []
    for _ in range(NUM_REFRESHES):
        version = made.grow()
        facts = client.refresh(server.url, server.token, version)
        assert facts.version == version
        pauses.append(facts.pause_seconds)
        time.sleep(0.1)
    is_over.set()
    for asker in askers:
        asker.join(120)
    answers = [answer for asker in askers for answer in asker.answers]
    assert {status for status, *_ in answers} == {200}
    seen = sorted({int(version) for _, version, *_ in answers})
    expected = {version: dict(zip(PROMPTS, reference_tokens(made.folders[version]), strict=True)) for version in seen}
    for _, version, prompt, tokens in answers:
        assert tokens == expected[int(version)][prompt], f"an answer of version {version}"
    assert len(seen) > NUM_REFRESHES / 2


def test_a_stalled_upload_holds_nobody_up(server: Serving) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n"
    )
    with socket.create_connection((host, int(port))) as stalled:
        stalled.sendall(head.encode() + b"{")
        time.sleep(0.5)
        facts = client.refresh(server.url, server.token, 0, allow_backward=True)
        assert (facts.version, facts.drain_seconds < 5) == (0, True)
        assert _complete(server.url).headers["x-weightline-version"] == "0"


def test_an_answer_that_would_be_generated_later_is_refused(server: Serving) -> None:
    asked = {"model": "tiny", "input": "a", "background": True, "store": True}
    refused = httpx.post(f"{server.url}/v1/responses", json=asked, timeout=PATIENCE_SECONDS, trust_env=False)
    assert refused.status_code == 400
    assert "comes from one version" in refused.text


def test_vllms_metrics_tell_of_the_replica(server: Serving) -> None:
    def count() -> float:
        shown = httpx.get(f"{server.url}/metrics", timeout=PATIENCE_SECONDS, trust_env=False).text
        assert "vllm:" in shown
        return float(re.findall(r'^weightline_completions_total\{replica="replica-0"\} (.*)$', shown, re.MULTILINE)[0])

    before = count()
    assert _complete(server.url).is_success
    assert count() == before + 1


def test_every_name_of_a_refused_option_is_known() -> None:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    refused = 0
    for action in make_arg_parser(FlexibleArgumentParser())._actions:
        names = [name for name in action.option_strings if not name.startswith("--no-")]
        if set(names) & set(REFUSED_OPTIONS):
            refused += 1
            assert set(names) <= set(REFUSED_OPTIONS)
    assert refused > 10


def test_what_is_refused_in_vllms_config_is_looked_for_where_it_stands() -> None:
    from vllm.config import ModelConfig, ParallelConfig, VllmConfig

    parts = {"parallel_config": ParallelConfig, "model_config": ModelConfig}
    for path, *_ in REFUSED_CONFIG:
        part, _, name = path.rpartition(".")
        assert name in {field.name for field in fields(parts.get(part, VllmConfig))}, path


def test_back_by_revert_and_the_same_answers_again(server: Serving) -> None:
    assert client.refresh(server.url, server.token, 1, allow_backward=True).version == 1
    answer = _complete(server.url)
    assert answer.headers["x-weightline-version"] == "1"
    assert _tokens(answer) == reference_tokens(server.made.folders[1], PROMPTS[:1])[0]


def test_a_caller_may_allow_an_answer_that_mixes_versions(server: Serving) -> None:
    """Such a request holds no refresh up; it goes on after it and says which versions took part."""
    now = client.refresh(server.url, server.token, 0, allow_backward=True).version
    answers: list[httpx.Response] = []
    fields = {"max_tokens": 200, "min_tokens": 200}

    def ask_mixing(is_over: threading.Event) -> None:
        while not is_over.is_set():
            answers.append(_complete(server.url, headers={"x-weightline-mixing": "allow"}, **fields))

    for attempt in range(10):
        target = now + 1 + attempt
        while len(server.made.folders) <= target:
            server.made.grow()
        answers.clear()
        is_over = threading.Event()
        asker = threading.Thread(target=ask_mixing, args=(is_over,))
        asker.start()
        time.sleep(0.05)
        facts = client.refresh(server.url, server.token, target)
        is_over.set()
        asker.join(120)
        assert all(answer.status_code == 200 for answer in answers)
        assert all(len(_tokens(answer)) == fields["max_tokens"] for answer in answers)
        versions = {answer.headers["x-weightline-version"] for answer in answers}
        if f"{target - 1},{target}" in versions:
            assert facts.drain_seconds < 5
            return
        assert all(re.fullmatch(r"\d+", version) for version in versions)
    pytest.fail("no refresh fell into an answer")


def test_a_server_that_was_killed_comes_back_to_its_version(tmp_path: Path) -> None:
    """kill -9 of all its processes: the mark says where it was, and the tip is not taken for it."""
    made = make_chain(tmp_path, "llama", num_versions=3)
    with serving(made, tmp_path / "state", "--every", "0.2") as running:
        wait_until(lambda: client.status(running.url).version == 2)
        version = made.grow()
        wait_until(lambda: client.status(running.url).version == version)
        os.killpg(running.process.pid, 9)
        running.process.wait()
    made.grow()
    with serving(made, tmp_path / "state", "--every", "0") as again:
        wait_until(lambda: client.status(again.url).version == version)
        assert _tokens(_complete(again.url)) == reference_tokens(made.folders[version], PROMPTS[:1])[0]
