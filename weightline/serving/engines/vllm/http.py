"""The HTTP side of a vLLM server that is a replica, as a middleware around vLLM's own app.

    vllm serve ... --middleware weightline.serving.engines.vllm.http.ReplicaMiddleware

It decides which routes need the replica's token, adds the replica's own routes, and passes requests that generate
through the request barrier, so that no answer mixes versions: a request is counted from before vLLM receives it until
its last byte is sent, a refresh waits until no request is counted, and new ones wait until the refresh is over.

A request with `x-weightline-mixing: allow` is not counted: it stays in vLLM's queue during the refresh, is computed
again from its tokens by the new weights, and continues. Its answer names the versions at its start and its end; a
stream, whose header is sent first, names the version at its start.
"""

from __future__ import annotations

import asyncio
import json
import os
import uuid
from collections.abc import Coroutine, Sequence
from enum import Enum, auto
from pathlib import Path
from typing import Any, Protocol, TypeVar

from fastapi import FastAPI
from fastapi.responses import JSONResponse
from prometheus_client import REGISTRY, Counter
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from weightline.errors import ApplyError, ErrorKind, InputError, VersionNotServedError
from weightline.serving.engines.barrier import AsyncRequestBarrier
from weightline.serving.engines.base import Abilities, Completion, GenerationRequest
from weightline.serving.engines.vllm.driver import VllmEngine, completions_of, prompts_of, samplings_of
from weightline.serving.engines.vllm.features import SERVER, require
from weightline.serving.engines.vllm.serve import SETTINGS_VARIABLE, VllmSettings, check_config
from weightline.serving.http.app import build_app
from weightline.serving.http.auth import is_authorized, load_token
from weightline.serving.http.bounds import (
    MAX_BODY_NBYTES,
    MAX_BODY_SECONDS,
    BodyReader,
    ReadFirst,
    refusal_of_headers,
    replaying,
    unauthorized,
)
from weightline.serving.http.errors import error_body
from weightline.serving.http.names import (
    COMPLETIONS_ROUTE,
    GENERATE_ROUTE,
    MIXING_HEADER,
    ROLLOUTS_ROUTE,
    VERSION_HEADER,
)
from weightline.serving.http.service import ReplicaService
from weightline.serving.http.versions import AskedVersion, VersionWaits, asked_version, not_served
from weightline.serving.replica.replica import Replica, ReplicaSettings

#: Bytes of bodies that the server holds at a time, over all requests. Images and sound are large.
MAX_HELD_NBYTES = 4 * 1024**3
#: A client that leaves a full buffer unread for this long is disconnected, so that it cannot delay a refresh.
MAX_SEND_SECONDS = 30.0
_NO_WEBSOCKETS = "websockets are not supported, since the answers of one connection would come from several versions"

T = TypeVar("T")


class Route(Enum):
    """The classes of requests, by their access rules."""

    OPEN = auto()
    """Describes the server, without use of the weights."""
    INFERENCE = auto()
    """Computed by the weights: passes the barrier, and the answer names their version."""
    OURS = auto()
    """Answered by the replica's own app."""
    CONTROL = auto()
    """Reads or controls the server's state, and generates nothing: needs the token, and never waits."""
    GUARDED = auto()
    """All other routes, including those of a later vLLM: needs the token, passes the barrier, names the version."""


_OPEN = frozenset(
    ("GET", path) for path in ("/health", "/load", "/metrics", "/ping", "/v1/models", "/version")
) | frozenset(("POST", path) for path in ("/tokenize", "/detokenize"))
_INFERENCE = frozenset(
    ("POST", path)
    for path in (
        COMPLETIONS_ROUTE, "/v1/chat/completions", "/v1/messages", "/v1/embeddings", "/v1/responses",
        "/v1/audio/transcriptions", "/v1/audio/translations", GENERATE_ROUTE, "/classify", "/pooling",
        "/score", "/v1/score", "/rerank", "/v1/rerank", "/v2/rerank",
    )
)  # fmt: skip
#: The requests by which a browser asks for permission (CORS) before it sends one of these.
_PREFLIGHT = frozenset(("OPTIONS", path) for _, path in _OPEN | _INFERENCE)
#: Requests that control the engine must not wait for it.
_CONTROL = frozenset(
    ("POST", path)
    for path in (
        "/pause", "/resume", "/sleep", "/wake_up", "/abort_requests", "/inference/v1/abort_requests",
        "/collective_rpc", "/reset_prefix_cache", "/reset_mm_cache", "/reset_encoder_cache",
        "/release_kv_cache_memory", "/init_weight_transfer_engine", "/shutdown_weight_transfer_engine",
        "/start_weight_update", "/start_draft_weight_update", "/update_weights", "/finish_weight_update",
        "/update_weight_version", "/weight_checker", "/start_profile", "/stop_profile",
    )
)  # fmt: skip
_READING = frozenset({"GET", "HEAD", "OPTIONS"})
_OURS = "/weightline/"
#: Routes of the replica's app, by the path under which they are reached here: vLLM has a /metrics of its own.
_RENAMED = {"/weightline/metrics": "/metrics", "/ready": "/ready"}


def classify(method: str, path: str) -> Route:
    """Returns the class of a request. Paths are compared as they are: a variant of a path is guarded."""
    if path.startswith(_OURS) or path in _RENAMED:
        return Route.OURS
    if (method, path) in _INFERENCE:
        return Route.INFERENCE
    if (method, path) in _OPEN or (method, path) in _PREFLIGHT:
        return Route.OPEN
    return Route.CONTROL if method in _READING or (method, path) in _CONTROL else Route.GUARDED


class ReplicaMiddleware:
    """The outermost of vLLM's middlewares, in pure ASGI.

    `weightline serve vllm` puts the replica's settings into the environment. The replica starts with the app's
    lifespan, once vLLM's engine runs, and ends with it.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app, self._read_first = app, ReadFirst(app)
        self._settings = VllmSettings.model_validate_json(os.environ[SETTINGS_VARIABLE])
        self._token = load_token(Path(self._settings.server.state_dir))
        self._engine: VllmEngine | None = None
        self._service: ReplicaService | None = None
        self._replica_app: FastAPI | None = None
        self._versioned: VersionedApp | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(scope, receive, send)
        elif scope["type"] == "http":
            await self._app_for(scope)(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008, "reason": _NO_WEBSOCKETS})

    async def _live(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes the lifespan on; starts the replica after the app has started, closes it before the app has ended."""

        async def watched(message: Message) -> None:
            if message["type"] == "lifespan.startup.complete":
                await self._start(scope["app"])
            elif message["type"].startswith("lifespan.shutdown"):
                await self._close()
            await send(message)

        await self._app(scope, receive, watched)

    async def _start(self, app: Any) -> None:
        check_config(app.state.engine_client.vllm_config)
        settings, barrier = self._settings.server, AsyncRequestBarrier()
        transport = OnlineTransport(app.state.engine_client, asyncio.get_running_loop())
        folder = Path(self._settings.model_folder)
        engine = self._engine = VllmEngine(transport, barrier, folder, abilities_of(app.state))
        options = ReplicaSettings(drain_seconds=settings.drain_seconds)
        replica = Replica(settings.open_chain(), engine, settings.state_dir, settings.name, options)
        service = self._service = ReplicaService(replica, settings.following, settings.presence(settings.port))
        self._replica_app = build_app(service, self._token)
        waits = VersionWaits(replica.watch, lambda: engine.version)
        self._versioned = VersionedApp(self._app, barrier, engine, service.metrics.completions, waits)
        # The registry that vLLM shows at /metrics.
        REGISTRY.register(service.metrics.registry)
        await asyncio.to_thread(service.start)

    async def _close(self) -> None:
        if self._service is not None:
            await asyncio.to_thread(self._service.close)
        if self._engine is not None:
            self._engine.close()

    def _app_for(self, scope: Scope) -> ASGIApp:
        """Returns the app that answers the request."""
        refused = refusal_of_headers(scope)
        if refused is not None:
            return refused
        route = classify(scope["method"], scope["path"])
        if route is Route.OPEN:
            return self._read_first
        if route is Route.OURS:
            return _renaming(self._replica_app) if self._replica_app else unavailable("the replica has not started yet")
        if route is not Route.INFERENCE and not self._is_authorized(scope):
            return unauthorized()
        if route is Route.CONTROL:
            return self._read_first
        return self._versioned or unavailable("the replica has not started yet")

    def _is_authorized(self, scope: Scope) -> bool:
        return is_authorized(Headers(scope=scope).get("authorization"), self._token)


def abilities_of(state: Any) -> Abilities:
    """Returns the abilities of a vLLM server, from the state of its app."""
    config, has_generate = state.engine_client.vllm_config.model_config, state.args.enable_scale_out
    has_spans = has_generate and hasattr(state.engine_client, "update_weight_version")
    routes = (GENERATE_ROUTE,) if has_generate else ()
    return Abilities(
        config.logprobs_mode, config.max_model_len, has_spans, (*routes, ROLLOUTS_ROUTE, COMPLETIONS_ROUTE)
    )


def _renaming(app: FastAPI) -> ASGIApp:
    """Returns the replica's app, reached by the paths of `_RENAMED`."""

    async def renamed(scope: Scope, receive: Receive, send: Send) -> None:
        path: str = _RENAMED.get(scope["path"]) or scope["path"]
        await app({**scope, "path": path, "raw_path": path.encode(), "root_path": ""}, receive, send)

    return renamed


class Versioned(Protocol):
    """The part of an engine that `VersionedApp` uses."""

    @property
    def version(self) -> int | None:
        """The version whose weights are in place; None while there is no checked one."""


class VersionedApp:
    """An app behind the request barrier, whose answers name their version. Pure ASGI, for HTTP.

    A request is counted when its body has arrived, and a client that stops reading is disconnected: neither a slow
    sender nor a slow reader delays a refresh. `answered` counts the answers of status 200.
    """

    def __init__(
        self,
        app: ASGIApp,
        barrier: AsyncRequestBarrier,
        engine: Versioned,
        answered: Counter,
        waits: VersionWaits,
        *,
        max_body_nbytes: int = MAX_BODY_NBYTES,
        max_body_seconds: float = MAX_BODY_SECONDS,
        max_send_seconds: float = MAX_SEND_SECONDS,
    ) -> None:
        self._app, self._barrier, self._engine, self._answered = app, barrier, engine, answered
        self._waits = waits
        self._reader, self._max_body_nbytes = BodyReader(max_body_seconds, MAX_HELD_NBYTES), max_body_nbytes
        self._max_send_seconds = max_send_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._reader.holding(scope, receive, send, self._max_body_nbytes) as body:
            if body is not None:
                await self._answer(scope, receive, send, body)

    async def _answer(self, scope: Scope, receive: Receive, send: Send, body: bytes) -> None:
        if _is_background(scope["path"], body):
            why = "background is not supported, since each answer comes from one version: leave it out, or use a stream"
            await JSONResponse(error_body(why, str(ErrorKind.INPUT)), 400)(scope, receive, send)
            return
        try:
            asked = asked_version(Headers(scope=scope))
            replayed = replaying(body, receive)
            await self._waits.answered(asked, lambda: self._pass(asked, scope, replayed, send), receive)
        except VersionNotServedError as error:
            await not_served(error)(scope, receive, send)
        except InputError as error:
            await JSONResponse(error_body(str(error), str(error.kind), error.facts), 400)(scope, receive, send)
        except ApplyError as error:
            await unavailable(str(error))(scope, receive, send)

    async def _pass(self, asked: AskedVersion, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on to the app behind the barrier. The errors of its bounds come before any answer."""
        allows_mixing = Request(scope).headers.get(MIXING_HEADER) == "allow"
        async with self._barrier.passing(is_counted=not allows_mixing):
            asked.bounds.require(self._engine.version)
            answer = _NamedAnswer(self._engine, send, self._max_send_seconds)
            await self._app(scope, receive, answer)
        if answer.status == 200:
            self._answered.inc()


class _NamedAnswer:
    """A `send` that adds a header with the version at the start of the answer, and at its end if that is another.

    TimeoutError when the client does not read the answer; the server then drops the connection.
    """

    def __init__(self, engine: Versioned, send: Send, max_send_seconds: float) -> None:
        self._engine, self._send, self._max_send_seconds = engine, send, max_send_seconds
        self._first = engine.version
        self.status: int | None = None

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            last = self._engine.version
            versions = f"{self._first}" if last in (self._first, None) else f"{self._first},{last}"
            message["headers"] = [*message.get("headers", ()), (VERSION_HEADER.encode(), versions.encode())]
        async with asyncio.timeout(self._max_send_seconds):
            await self._send(message)


def unavailable(why: str) -> JSONResponse:
    """Returns the 503 reply to a request that may be retried."""
    return JSONResponse(error_body(why, str(ErrorKind.APPLY)), 503, {"retry-after": "1"})


def _is_background(path: str, body: bytes) -> bool:
    """Returns whether vLLM would answer at once and generate later, when the request is not counted any more."""
    if not path.endswith("/v1/responses"):
        return False
    try:
        document = json.loads(body)
    except ValueError:
        return False  # vLLM refuses it
    return isinstance(document, dict) and bool(document.get("background"))


class OnlineTransport:
    """Implements `Transport` on the engine client of this server. Its methods are for threads other than the loop's."""

    def __init__(self, engine_client: Any, loop: asyncio.AbstractEventLoop) -> None:
        require(SERVER)
        self._client, self._loop = engine_client, loop

    def call_workers(self, method: str, *arguments: str) -> Sequence[str]:
        answers: Sequence[str] = self._wait(self._client.collective_rpc(method, args=arguments))
        return answers

    def pause(self) -> None:
        """Stops generation. Of the requests that passed the barrier, those that allow mixing return to the queue."""
        self._wait(self._client.pause_generation(mode="keep"))

    def resume(self) -> None:
        self._wait(self._client.resume_generation())

    def drop_prefix_cache(self) -> None:
        if not self._wait(self._client.reset_prefix_cache(reset_running_requests=True, reset_connector=True)):
            raise ApplyError("vLLM did not reset its prefix cache", engine=VllmEngine.name)

    def report_version(self, version: int | None) -> None:
        report = getattr(self._client, "update_weight_version", None)
        if report is not None:
            self._wait(report("unknown" if version is None else str(version)))

    def generate(self, request: GenerationRequest) -> tuple[tuple[Completion, ...], tuple[tuple[int, ...], ...]]:
        return completions_of(self._wait(self._generate(request)))

    async def _generate(self, request: GenerationRequest) -> list[Any]:
        asked = zip(prompts_of(request), samplings_of(request), strict=True)
        return await asyncio.gather(*(self._last_output(prompt, sampling) for prompt, sampling in asked))

    async def _last_output(self, prompt: Any, sampling: Any) -> Any:
        last = None
        try:
            async for output in self._client.generate(prompt, sampling, f"weightline-{uuid.uuid4().hex}"):
                last = output
        except ValueError as error:
            raise InputError(f"vLLM refuses the request: {error}", field="prompt") from error
        return last

    def _wait(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()
