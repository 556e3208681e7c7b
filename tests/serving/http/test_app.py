"""The HTTP app of a replica: what it answers, to whom, and what it refuses."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest

from tests.serving.model_chains import ModelChain, make_chain
from weightline.errors import ErrorKind, InputError, VersionNotFoundError
from weightline.serving.engines.base import GenerationRequest
from weightline.serving.engines.transformers import TransformersEngine
from weightline.serving.http.app import build_app
from weightline.serving.http.auth import load_token, read_token
from weightline.serving.http.errors import error_body, error_of
from weightline.serving.http.service import ReplicaService
from weightline.serving.replica.replica import Replica

TOKEN = "s3cret"
AUTHORIZED = {"authorization": f"Bearer {TOKEN}"}


class AppClient:
    """Asks an app in this process."""

    def __init__(self, service: ReplicaService) -> None:
        self.app = build_app(service, TOKEN)

    def ask(
        self, method: str, route: str, body: object = None, headers: dict[str, str] | None = None
    ) -> httpx.Response:
        async def ask() -> httpx.Response:
            async with httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://replica") as client:
                if isinstance(body, bytes):
                    return await client.request(
                        method, route, content=body, headers={"content-type": "application/json"}
                    )
                return await client.request(method, route, json=body, headers=headers)

        return anyio.run(ask)

    def complete(self, **body: Any) -> httpx.Response:
        return self.ask("POST", "/v1/completions", {"prompt": "12+34=", "temperature": 0, "max_tokens": 8} | body)

    def refresh(self, headers: dict[str, str] | None = AUTHORIZED, **body: Any) -> httpx.Response:
        return self.ask("POST", "/weightline/refresh", body, headers)


@pytest.fixture
def client(replica: Replica) -> AppClient:
    return AppClient(ReplicaService(replica))


@pytest.fixture(scope="module")
def unloaded(tmp_path_factory: pytest.TempPathFactory) -> AppClient:
    """A replica that waits for the first version of an empty chain."""
    empty = make_chain(f"memory://{uuid.uuid4().hex}/toy", num_versions=0)
    folder = tmp_path_factory.mktemp("state")
    return AppClient(ReplicaService(Replica(empty.chain, TransformersEngine("cpu"), folder, "replica-0")))


def test_a_completion_says_which_version_answered(client: AppClient, replica: Replica) -> None:
    for version in (0, 2):
        replica.refresh(version)
        answer = client.complete()
        told = answer.json()
        expected = replica.engine.generate(GenerationRequest(("12+34=",), max_tokens=8))
        assert answer.status_code == 200
        assert answer.headers["x-weightline-version"] == str(version)
        assert told["weightline_version"] == version
        assert told["object"] == "text_completion"
        assert told["model"] == replica.chain.name == "toy"
        (choice,) = told["choices"]
        assert choice["text"] == expected.completions[0].text
        assert choice["finish_reason"] == "length"
        assert told["usage"] == {"prompt_tokens": 6, "completion_tokens": 8, "total_tokens": 14}


def test_the_same_prompt_as_text_tokens_and_in_a_batch(client: AppClient) -> None:
    text = "7+8="
    (alone,) = client.complete(prompt=text).json()["choices"]
    (tokens,) = client.complete(prompt=list(text.encode())).json()["choices"]
    first, second = client.complete(prompt=[text, text]).json()["choices"]
    batch = client.complete(prompt=[list(text.encode())] * 2).json()["choices"]
    assert alone["text"] == tokens["text"] == first["text"] == second["text"] == batch[1]["text"]
    assert (first["index"], second["index"]) == (0, 1)


def test_a_stop_string_ends_the_text_before_it(client: AppClient) -> None:
    whole = client.complete(max_tokens=16).json()["choices"][0]["text"]
    stop = whole[5:7]
    (choice,) = client.complete(max_tokens=16, stop=["never there", stop]).json()["choices"]
    assert choice["finish_reason"] == "stop"
    assert choice["text"] == whole[: whole.index(stop)]


def test_sampling_repeats_with_a_seed_and_varies_without(client: AppClient) -> None:
    def texts(**body: Any) -> set[str]:
        answers = (client.complete(temperature=2.0, max_tokens=12, **body) for _ in range(3))
        return {answer.json()["choices"][0]["text"] for answer in answers}

    assert len(texts(seed=7)) == 1
    assert len(texts()) > 1


@pytest.mark.parametrize(
    ("body", "field", "says"),
    [
        ({"stream": True}, "stream", "streaming is not supported"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"logprobs": 21}, "logprobs", "less than or equal to 20"),
        ({"best_of": 3}, "best_of", "does not support"),
        ({"temperature": -1}, "temperature", "greater than or equal to 0"),
        ({"prompt": {"text": "x"}}, "prompt", "valid"),
        ({"prompt": ""}, "prompt", "at least one token"),
        ({"prompt": [999]}, "prompt", "token ids below 258"),
        ({"max_tokens": 123}, "max_tokens", "exceed the model's 128 positions"),
    ],
)
def test_a_completion_that_cannot_be_given_is_refused_by_field(
    client: AppClient, body: dict[str, Any], field: str, says: str
) -> None:
    answer = client.complete(**body)
    told = answer.json()["error"]
    assert answer.status_code == 400
    assert told["code"] == "input"
    assert told["facts"]["field"] == field
    assert says in told["message"]


def test_another_models_name_is_not_found(client: AppClient) -> None:
    answer = client.complete(model="gpt-4")
    assert answer.status_code == 404
    assert "this replica serves 'toy'" in answer.json()["error"]["message"]
    assert client.complete(model="toy").status_code == 200
    assert client.ask("GET", "/v1/models").json()["data"][0]["id"] == "toy"


def test_before_the_first_version_health_says_so_and_completions_wait(unloaded: AppClient) -> None:
    health = unloaded.ask("GET", "/health")
    assert health.status_code == 200
    assert health.json()["status"] == "waiting"
    assert "no checked version" in health.json()["detail"]
    assert unloaded.ask("GET", "/ready").status_code == 503
    answer = unloaded.complete()
    assert answer.status_code == 503
    assert "no checked version of memory://" in answer.json()["error"]["message"]
    refreshed = unloaded.refresh()
    assert (refreshed.status_code, refreshed.json()["error"]["code"]) == (404, "chain-empty")
    status = unloaded.ask("GET", "/weightline/status").json()
    assert (status["state"], status["version"], status["tip_version"], status["lag_versions"]) == (
        "waiting",
        None,
        None,
        None,
    )


def test_a_refresh_answers_with_its_facts(client: AppClient, grown: ModelChain) -> None:
    assert client.ask("GET", "/weightline/status").json()["lag_versions"] == 2
    facts = client.refresh(version=1).json()
    assert facts["version"] == 1
    assert facts["num_changed"] == grown.chain.manifest(1).num_changed
    assert facts["payload_nbytes"] == grown.chain.manifest(1).payload_nbytes
    assert {"pause_seconds", "prepare_seconds", "served_at"} <= facts.keys()
    assert client.ask("GET", "/weightline/status").json()["last_refresh"] == facts
    assert client.refresh(version=None).json()["version"] == 2
    assert client.refresh(version=0).json()["version"] == 2
    assert client.refresh(version=0, allow_backward=True).json()["version"] == 0
    assert client.ask("GET", "/ready").json() == {"status": "serving", "version": 0}


def test_an_unknown_version_is_not_found_and_named(client: AppClient) -> None:
    answer = client.refresh(version=9)
    assert answer.status_code == 404
    told = answer.json()["error"]
    assert told["code"] == "version-not-found"
    assert told["facts"]["version"] == 9
    error = error_of(answer.json(), "")
    assert isinstance(error, VersionNotFoundError)
    assert error.version == 9


@pytest.mark.parametrize("device", ["nonsense", "cpu:-5", "xpu:0"])
def test_a_device_that_is_not_here_is_refused(device: str) -> None:
    with pytest.raises(InputError, match=f"device '{device}' cannot be used"):
        TransformersEngine(device)


@pytest.mark.parametrize("field", ["prompt", "stop", "model", "user"])
def test_half_a_surrogate_pair_is_refused(client: AppClient, field: str) -> None:
    for half in (rb'"\ud800"', rb'["a\udfff"]') if field in ("prompt", "stop") else (rb'"\ud800"',):
        answer = client.ask("POST", "/v1/completions", b'{"prompt": "a", "%s": %s}' % (field.encode(), half))
        assert (answer.status_code, answer.json()["error"]["facts"]) == (400, {"field": field})


@pytest.mark.parametrize(
    "header",
    [None, "", TOKEN, "Bearer", "Bearer ", "Bearer wrong", f"Basic {TOKEN}", f"Bearer {TOKEN}x", "Bearer \xe9"],
)
def test_a_refresh_needs_the_token(unloaded: AppClient, header: str | None) -> None:
    headers = {} if header is None else {"authorization": header.encode("latin-1")}
    answer = unloaded.refresh(headers=headers)  # type: ignore[arg-type]
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.json()["error"]["code"] == "unauthorized"
    assert isinstance(error_of(answer.json(), ""), InputError)


@pytest.mark.parametrize("body", [{"version": -1}, {"version": "two"}, {"verison": 1}, {"version": 1.5}])
def test_a_refresh_with_a_bad_body_is_refused(unloaded: AppClient, body: dict[str, Any]) -> None:
    answer = unloaded.refresh(**body)
    assert answer.status_code == 400
    assert answer.json()["error"]["facts"]["field"] in ("version", "verison")


def test_metrics_count(client: AppClient, replica: Replica) -> None:
    client.refresh(version=1)
    client.refresh(version=9)
    client.complete(prompt=["1", "2"])
    lines = client.ask("GET", "/metrics").text.splitlines()
    for line in (
        'weightline_replica_version{replica="replica-0"} 1.0',
        'weightline_replica_lag_versions{replica="replica-0"} 1.0',
        'weightline_refresh_pause_seconds_count{replica="replica-0"} 1.0',
        'weightline_refresh_failures_total{kind="version-not-found",replica="replica-0"} 1.0',
        'weightline_refresh_prepare_seconds_count{replica="replica-0"} 1.0',
        'weightline_refresh_part_seconds_count{part="read_base",replica="replica-0"} 1.0',
        'weightline_completions_total{replica="replica-0"} 2.0',
    ):
        assert line in lines
    lag = next(line for line in lines if line.startswith("weightline_replica_lag_seconds{"))
    assert float(lag.rpartition(" ")[2]) > 0
    nbytes = replica.chain.manifest(1).payload_nbytes
    assert f'weightline_refresh_payload_bytes_total{{replica="replica-0"}} {float(nbytes)}' in lines


def test_reading_the_status_sets_no_metric(client: AppClient) -> None:
    before = client.ask("GET", "/metrics").text
    assert client.ask("GET", "/weightline/status").json()["lag_versions"] == 2
    assert client.ask("GET", "/metrics").text == before


def test_a_token_is_made_once_and_kept_from_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WEIGHTLINE_TOKEN", raising=False)
    made = load_token(tmp_path)
    assert len(made) >= 32
    assert load_token(tmp_path) == made == read_token(tmp_path / "token")
    assert (tmp_path / "token").stat().st_mode & 0o777 == 0o600
    (tmp_path / "token").chmod(0o644)
    with pytest.raises(InputError, match="other users can access"):
        load_token(tmp_path)
    monkeypatch.setenv("WEIGHTLINE_TOKEN", "given")
    assert load_token(tmp_path) == "given"
    monkeypatch.setenv("WEIGHTLINE_TOKEN", " ")
    with pytest.raises(InputError, match="holds no token"):
        load_token(tmp_path)


def test_every_kind_of_error_comes_back_as_its_type() -> None:
    for kind in ErrorKind:
        error = error_of(error_body("text", str(kind), {"version": 3}), "fallback")
        assert error.kind == kind
        assert (str(error), error.facts) == ("text", {"version": 3})
    assert str(error_of("<html>", "fallback")) == "fallback"
