"""What stands between a vLLM and its callers, on an app that answers slowly: no vLLM takes part."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from prometheus_client import CollectorRegistry, Counter
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope

from weightline.serving.engines.barrier import AsyncRequestBarrier
from weightline.serving.engines.vllm.http import ReplicaMiddleware, VersionedApp
from weightline.serving.engines.vllm.serve import SETTINGS_VARIABLE, VllmSettings
from weightline.serving.http.server import ServerSettings
from weightline.serving.http.versions import VersionWaits
from weightline.serving.replica.watch import VersionWatch

_SCOPE: Scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}
TOKEN = {"authorization": "Bearer s3cret"}


@dataclass
class Weights:
    """An engine that answers with its version, again and again, and so shows whether that changes under an answer."""

    version: int | None = 1

    async def answer(self, request: Request) -> StreamingResponse:
        asked = await request.body()

        async def words() -> object:
            for _ in range(5):
                yield f"{self.version}"
                await asyncio.sleep(0.01)
            yield f":{asked.decode()}"

        return StreamingResponse(words())  # type: ignore[arg-type]


class Scene:
    """A versioned app on the loop that runs the test."""

    def __init__(self, **limits: float) -> None:
        self.weights, self.barrier = Weights(), AsyncRequestBarrier()
        self.answered = Counter("answered", "answers", registry=CollectorRegistry())
        app = Starlette(routes=[Route("/{rest:path}", self.weights.answer, methods=["POST"])])
        self.watch = VersionWatch()
        waits = VersionWaits(self.watch, lambda: self.weights.version, max_waiting=2)
        self.app = VersionedApp(app, self.barrier, self.weights, self.answered, waits, **limits)  # type: ignore[arg-type]

    async def ask(
        self, body: str = "hello", path: str = "/v1/completions", headers: dict[str, str] | None = None
    ) -> httpx.Response:
        return await _ask(self.app, "POST", path, content=body, headers=headers)

    async def refresh(self, version: int, drain_seconds: float = 5.0) -> None:
        await asyncio.to_thread(self.barrier.drain, drain_seconds)
        self.weights.version = version
        self.watch.announce()
        await asyncio.to_thread(self.barrier.release)

    async def take_nothing(self) -> None:
        """What a caller does who asks, and then reads no word of the answer."""

        async def send(message: Message) -> None:
            if message["type"] == "http.response.body":
                await _for_ever()

        await self.app(_SCOPE, _telling({"type": "http.request", "body": b"hello", "more_body": False}), send)

    async def upload_in_part(self) -> list[Message]:
        """What a caller is told who sends the beginning of a body, and then nothing more."""
        told: list[Message] = []

        async def send(message: Message) -> None:
            told.append(message)

        await self.app(_SCOPE, _telling({"type": "http.request", "body": b"{", "more_body": True}), send)
        return told


def _telling(first: Message) -> Receive:
    """A `receive` of one message, and then of nothing more."""
    messages = iter([first])

    async def receive() -> Message:
        for message in messages:
            return message
        return await _for_ever()

    return receive


async def _for_ever() -> Message:
    return await asyncio.get_running_loop().create_future()  # type: ignore[no-any-return]


async def _ask(app: ASGIApp, method: str, path: str, **options: object) -> httpx.Response:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://vllm") as asking:
        return await asking.request(method, path, **options)  # type: ignore[arg-type]


def _run(play: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(play())  # type: ignore[arg-type]


def test_answers_come_from_one_version_and_name_it() -> None:
    async def play() -> None:
        scene = Scene()
        for version in range(2, 6):
            asking = [asyncio.create_task(scene.ask()) for _ in range(3)]
            await asyncio.sleep(0.02)
            await scene.refresh(version)
            answers = await asyncio.gather(*asking)
            assert {answer.text for answer in answers} == {f"{version - 1}" * 5 + ":hello"}
            assert {answer.headers["x-weightline-version"] for answer in answers} == {f"{version - 1}"}
        assert scene.answered._value.get() == 12

    _run(play)


def test_a_stalled_upload_holds_no_refresh_up() -> None:
    async def play() -> None:
        scene = Scene()
        stalled = asyncio.create_task(scene.upload_in_part())
        await asyncio.sleep(0.02)
        await scene.refresh(2, drain_seconds=0.5)
        assert (await scene.ask()).headers["x-weightline-version"] == "2"
        assert not stalled.done()
        stalled.cancel()
        with suppress(asyncio.CancelledError):
            await stalled

    _run(play)


def test_a_stalled_reader_holds_no_refresh_up_for_long() -> None:
    async def play() -> None:
        scene = Scene(max_send_seconds=0.1)
        stalled = asyncio.create_task(scene.take_nothing())
        await asyncio.sleep(0.02)
        await scene.refresh(2, drain_seconds=2.0)
        with pytest.raises(TimeoutError):
            await stalled

    _run(play)


def test_a_body_has_limits_of_time_and_size() -> None:
    async def play() -> None:
        scene = Scene(max_body_seconds=0.05, max_body_nbytes=10)
        told = await scene.upload_in_part()
        assert told[0]["status"] == 408
        assert (await scene.ask("x" * 11)).status_code == 413
        assert (await scene.ask("x" * 10)).text.endswith(":" + "x" * 10)

    _run(play)


@pytest.mark.parametrize("path", ["/v1/responses", "/under/a/root/v1/responses"])
def test_an_answer_that_would_be_generated_later_is_refused(path: str) -> None:
    async def play() -> None:
        scene = Scene()
        for asked in ("true", "1", '"on"'):
            refused = await scene.ask(f'{{"input": "a", "background": {asked}}}', path)
            assert refused.status_code == 400
            assert "background" in refused.json()["error"]["message"]
        for body in ('{"background": false}', '{"background": null}', '["background"]', "no json"):
            assert (await scene.ask(body, path)).is_success
        assert (await scene.ask('{"background": true}')).is_success

    _run(play)


def test_a_request_for_a_version_waits_for_it_or_is_refused_with_the_one_that_is_served() -> None:
    async def play() -> None:
        scene = Scene()
        for asked in ({"x-weightline-min-version": "2"}, {"x-weightline-version": "0"}):
            refused = await scene.ask(headers=asked)
            assert (refused.status_code, refused.headers["x-weightline-version"]) == (409, "1")
            assert refused.json()["error"]["code"] == "version-not-served"
            assert refused.json()["error"]["facts"] == {"version": 1}
        assert (await scene.ask(headers={"x-weightline-min-version": "1"})).text.startswith("11111")
        patient = {"x-weightline-wait-seconds": "60"}
        pinned = asyncio.create_task(scene.ask(headers={"x-weightline-version": "3"} | patient))
        lowest = asyncio.create_task(scene.ask(headers={"x-weightline-min-version": "2"} | patient))
        await asyncio.sleep(0.02)
        full = await scene.ask(headers={"x-weightline-version": "9"} | patient)
        assert (full.status_code, full.headers["retry-after"]) == (503, "1")
        await scene.refresh(2)
        assert (await lowest).headers["x-weightline-version"] == "2"
        assert not pinned.done()
        await scene.refresh(3)
        assert (await pinned).text == "33333:hello"

    _run(play)


def test_a_request_is_checked_inside_the_barrier() -> None:
    """Version 1 is served when it arrives, and version 2 when it has passed."""

    async def play() -> None:
        scene = Scene()
        await asyncio.to_thread(scene.barrier.drain, 5.0)
        pinned = asyncio.create_task(scene.ask(headers={"x-weightline-version": "1"}))
        await asyncio.sleep(0.02)
        scene.weights.version = 2
        await asyncio.to_thread(scene.barrier.release)
        refused = await pinned
        assert (refused.status_code, refused.headers["x-weightline-version"]) == (409, "2")

    _run(play)


@pytest.mark.parametrize(
    ("headers", "field"),
    [
        ({"x-weightline-min-version": "-1"}, "x-weightline-min-version"),
        ({"x-weightline-version": "tip"}, "x-weightline-version"),
        ({"x-weightline-version": "9" * 30}, "x-weightline-version"),
        ({"x-weightline-wait-seconds": "601"}, "x-weightline-wait-seconds"),
        ({"x-weightline-wait-seconds": "nan"}, "x-weightline-wait-seconds"),
        ({"x-weightline-min-version": "2", "x-weightline-version": "1"}, "x-weightline-version"),
        ({"x-weightline-mixing": "allow", "x-weightline-version": "1"}, "x-weightline-version"),
    ],
)
def test_a_header_that_cannot_be_used_is_named(headers: dict[str, str], field: str) -> None:
    async def play() -> None:
        refused = await Scene().ask(headers=headers)
        assert (refused.status_code, refused.json()["error"]["facts"]) == (400, {"field": field})

    _run(play)


def test_without_a_version_it_says_when_to_come_back() -> None:
    async def play() -> None:
        scene = Scene()
        scene.weights.version = None
        answer = await scene.ask()
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        assert scene.answered._value.get() == 0

    _run(play)


@pytest.fixture
def middleware(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ReplicaMiddleware:
    """Around an app that answers everything, as if of no version; the replica has not started."""
    settings = VllmSettings(server=ServerSettings("memory://none/toy", tmp_path), model_folder=str(tmp_path))
    monkeypatch.setenv(SETTINGS_VARIABLE, settings.model_dump_json())
    monkeypatch.setenv("WEIGHTLINE_TOKEN", "s3cret")
    return ReplicaMiddleware(PlainTextResponse("unversioned"))


@pytest.mark.parametrize(
    "path",
    [
        "/v1/completions", "/invocations", "/v1/chat/completions/batch", "/v2/embed", "/cohere/v2/chat",
        "/generative_scoring", "/v1/systemone", "/v1/something/new", "//v1/completions",
    ],
)  # fmt: skip
def test_nothing_that_may_generate_passes_beside_the_barrier(middleware: ReplicaMiddleware, path: str) -> None:
    for method in ("POST", "PUT", "PATCH"):
        answer = asyncio.run(_ask(middleware, method, path, headers=TOKEN))
        if (method, path) != ("POST", "/v1/completions"):
            assert asyncio.run(_ask(middleware, method, path)).status_code == 401
        assert answer.status_code == 503, "there is no barrier yet to pass"


def test_whoever_steers_the_engine_with_the_token_does_not_wait_for_it(middleware: ReplicaMiddleware) -> None:
    for method, path in [("POST", "/collective_rpc"), ("POST", "/resume"), ("GET", "/server_info")]:
        assert asyncio.run(_ask(middleware, method, path)).status_code == 401
        assert asyncio.run(_ask(middleware, method, path, headers=TOKEN)).text == "unversioned"


def test_a_browser_may_ask_before_it_asks(middleware: ReplicaMiddleware) -> None:
    preflight = {"origin": "http://elsewhere", "access-control-request-method": "POST"}
    assert asyncio.run(_ask(middleware, "OPTIONS", "/v1/chat/completions", headers=preflight)).text == "unversioned"
    assert asyncio.run(_ask(middleware, "OPTIONS", "/collective_rpc", headers=preflight)).status_code == 401


def test_a_websocket_is_closed_whoever_opens_it(middleware: ReplicaMiddleware) -> None:
    told: list[Message] = []

    async def send(message: Message) -> None:
        told.append(message)

    async def receive() -> Message:
        return {"type": "websocket.connect"}

    headers = [(b"authorization", b"Bearer s3cret")]
    asyncio.run(middleware({"type": "websocket", "path": "/v1/realtime", "headers": headers}, receive, send))  # type: ignore[arg-type]
    assert [message["type"] for message in told] == ["websocket.close"]
