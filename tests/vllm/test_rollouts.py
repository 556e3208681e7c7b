"""Samples for a trainer from a real vLLM: logprobs and spans against the pulled weights, requests for versions."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.vllm.parts import make_chain
from tests.vllm.test_server import Serving, serving
from tests.waiting import PATIENCE_SECONDS
from weightline.chain.files.checkpoint import write_checkpoint
from weightline.errors import ErrorKind
from weightline.serving.http import client
from weightline.serving.http.errors import error_of

PROMPT = list(b"12+34=")
GENERATE, ROLLOUTS = "/inference/v1/generate", "/weightline/rollouts"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    folder = tmp_path_factory.mktemp("rollouts")
    made = make_chain(folder, "qwen3", num_versions=3)
    with serving(made, folder / "state", "--every", "0") as running:
        client.refresh(running.url, running.token, 1)
        yield running


class Reference:
    """The logprobs of tokens by forward passes in float32 on the pulled checkpoints of versions."""

    def __init__(self, server: Serving, folder: Path) -> None:
        self._server, self._folder = server, folder
        self._model = cache(self._load)

    def _load(self, version: int) -> Any:
        folder = self._folder / f"v{version}"
        write_checkpoint(self._server.made.chain, version, folder)
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.inference_mode()
    def logprobs(self, version: int, tokens: Sequence[int], temperature: float) -> list[float]:
        logits = self._model(version)(torch.tensor([[*PROMPT, *tokens]])).logits[0, len(PROMPT) - 1 : -1]
        found = (logits / temperature).log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]
        return list(found.tolist())


@pytest.fixture
def reference(server: Serving, tmp_path: Path) -> Reference:
    return Reference(server, tmp_path)


def _post(server: Serving, route: str, body: dict[str, Any], headers: dict[str, str] | None = None) -> httpx.Response:
    return httpx.post(server.url + route, json=body, headers=headers, timeout=PATIENCE_SECONDS, trust_env=False)


def _generate(server: Serving, headers: dict[str, str] | None = None, **sampling: Any) -> httpx.Response:
    params = {"n": 4, "max_tokens": 16, "temperature": 1.0, "logprobs": 0, "seed": 7} | sampling
    return _post(server, GENERATE, {"token_ids": PROMPT, "sampling_params": params}, headers)


def _samples(answer: httpx.Response) -> list[tuple[list[int], list[float]]]:
    assert answer.status_code == 200, answer.text
    return [
        (choice["token_ids"], [one["logprob"] for one in choice["logprobs"]["content"]])
        for choice in answer.json()["choices"]
    ]


def _furthest(one: Sequence[float], other: Sequence[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def test_the_status_names_the_routes_the_spans_and_the_kind_of_logprobs(server: Serving) -> None:
    told = client.status(server.url)
    assert told.rollout_routes == (GENERATE, ROLLOUTS, "/v1/completions")
    assert (told.has_spans, told.logprobs_mode, told.max_model_len) == (True, "processed_logprobs", 256)


def test_logprobs_after_the_temperature_are_those_of_the_version_and_of_no_other(
    server: Serving, reference: Reference
) -> None:
    version = client.refresh(server.url, server.token, 1, allow_backward=True).version
    rolled = _post(
        server, ROLLOUTS, {"prompts": [PROMPT, PROMPT], "n": 3, "max_tokens": 16, "temperature": 0.7, "seed": 3}
    )
    assert (rolled.status_code, rolled.json()["version"]) == (200, version)
    groups = rolled.json()["samples"]
    assert [len(group) for group in groups] == [3, 3]
    found = [(one["token_ids"], one["logprobs"]) for group in groups for one in group]
    assert len({tuple(tokens) for tokens, _ in found}) > 1
    found += _samples(_generate(server, temperature=0.7))
    for tokens, logprobs in found:
        assert _furthest(logprobs, reference.logprobs(version, tokens, 0.7)) < 1e-4
    assert max(_furthest(logprobs, reference.logprobs(0, tokens, 0.7)) for tokens, logprobs in found) > 1e-2


def test_a_seed_gives_the_same_samples_again(server: Serving) -> None:
    body = {"prompts": [PROMPT], "n": 4, "max_tokens": 16, "seed": 11}
    once, again, others = (_post(server, ROLLOUTS, body | more).json() for more in ({}, {}, {"seed": 12}))
    tokens, same, different = ([one["token_ids"] for one in told["samples"][0]] for told in (once, again, others))
    assert tokens == same != different


@pytest.mark.parametrize("route", [GENERATE, ROLLOUTS, "/v1/completions"])
def test_a_request_names_its_version(server: Serving, route: str) -> None:
    version = client.refresh(server.url, server.token, 1, allow_backward=True).version
    body = {
        GENERATE: {"token_ids": PROMPT, "sampling_params": {"max_tokens": 4}},
        ROLLOUTS: {"prompts": [PROMPT], "max_tokens": 4},
        "/v1/completions": {"model": "tiny", "prompt": PROMPT, "max_tokens": 4},
    }[route]
    for asked in ({"x-weightline-min-version": f"{version + 1}"}, {"x-weightline-version": "0"}):
        refused = _post(server, route, body, asked)
        assert (refused.status_code, refused.headers["x-weightline-version"]) == (409, f"{version}")
        error = error_of(refused.json(), "")
        assert (error.kind, error.facts) == (ErrorKind.VERSION_NOT_SERVED, {"version": version})
    assert _post(server, route, body, {"x-weightline-version": f"{version}"}).status_code == 200
    bad = _post(server, route, body, {"x-weightline-wait-seconds": "long"})
    assert (bad.status_code, bad.json()["error"]["facts"]) == (400, {"field": "x-weightline-wait-seconds"})


def test_requests_and_polls_wait_for_their_version(server: Serving) -> None:
    client.refresh(server.url, server.token, 1, allow_backward=True)
    answers: list[httpx.Response] = []
    headers = {"x-weightline-min-version": "2", "x-weightline-wait-seconds": "200"}
    asking = threading.Thread(target=lambda: answers.append(_generate(server, headers)))
    polled: list[int | None] = []
    polling = threading.Thread(target=lambda: polled.append(client.wait_for_version(server.url, 2, 200).version))
    asking.start()
    polling.start()
    assert client.wait_for_version(server.url, 2, 0.5).version == 1
    assert not answers
    client.refresh(server.url, server.token, 2)
    asking.join(PATIENCE_SECONDS)
    polling.join(PATIENCE_SECONDS)
    assert polled == [2]
    assert (answers[0].status_code, answers[0].headers["x-weightline-version"]) == (200, "2")


def test_each_token_of_an_answer_that_straddles_a_refresh_has_the_weights_of_its_span(
    server: Serving, reference: Reference
) -> None:
    straddling = _straddling_choices(server)
    for choice in straddling:
        tokens = choice["token_ids"]
        logprobs = [one["logprob"] for one in choice["logprobs"]["content"]]
        spans = [(int(one["version"]), one["start"], one["end"]) for one in choice["weight_versions"]]
        assert [start for _, start, _ in spans] == [0, *(end for _, _, end in spans[:-1])]
        assert spans[-1][2] == len(tokens)
        of_version = {version: reference.logprobs(version, tokens, 1.0) for version, *_ in spans}
        for version, start, end in spans:
            own = of_version[version][start:end]
            assert _furthest(logprobs[start:end], own) < 1e-4, f"tokens {start} to {end} of version {version}"
            others = (of_version[other][start:end] for other in of_version if other != version)
            # A span of a few tokens may look alike by chance.
            assert end - start < 8 or all(_furthest(logprobs[start:end], other) > 1e-3 for other in others)


def _wait_until_it_generates(server: Serving) -> None:
    """A refresh of a small model takes less time than the way of a request into vLLM."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        shown = httpx.get(f"{server.url}/metrics", timeout=PATIENCE_SECONDS, trust_env=False).text
        if any(
            float(found) > 0 for found in re.findall(r"^vllm:num_requests_running\{.*\} (.*)$", shown, re.MULTILINE)
        ):
            return
        time.sleep(0.02)
    pytest.fail("no request began")


def _straddling_choices(server: Serving) -> list[dict[str, Any]]:
    """Choices of requests that allow mixing, with tokens of two versions."""
    now = client.status(server.url).version
    assert now is not None
    for target in range(now + 1, now + 11):
        while len(server.made.folders) <= target:
            server.made.grow()
        is_over, answers = threading.Event(), list[httpx.Response]()

        def ask(is_over: threading.Event = is_over, answers: list[httpx.Response] = answers) -> None:
            # Not by min_tokens, which takes the end token out of the distribution.
            length = {"max_tokens": 200, "ignore_eos": True}
            while not is_over.is_set():
                answers.append(_generate(server, {"x-weightline-mixing": "allow"}, **length))

        asker = threading.Thread(target=ask)
        asker.start()
        _wait_until_it_generates(server)
        client.refresh(server.url, server.token, target)
        is_over.set()
        asker.join(PATIENCE_SECONDS)
        assert all(answer.status_code == 200 for answer in answers)
        found = [choice for answer in answers for choice in answer.json()["choices"]]
        straddling = [choice for choice in found if len(choice["weight_versions"]) > 1]
        if straddling:
            return straddling
    pytest.fail("no refresh fell into an answer")
