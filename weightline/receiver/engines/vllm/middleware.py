"""The middleware of a vLLM server that is a replica: its gate, its token, the version in its answers, its own routes.

    vllm serve ... --middleware weightline.receiver.engines.vllm.middleware.ReplicaMiddleware

`weightline serve vllm` puts the replica's settings into the environment. The replica starts with the app's lifespan,
when vLLM's engine is up, and ends with it.

Why no answer mixes versions: a request is counted from before vLLM sees it until its last byte is sent, a refresh waits
until none is counted, and new ones wait until the refresh is over. A caller who sends `x-weightline-mixing: allow` is
not counted: its request stands in vLLM's queue during the refresh, is computed again from its tokens by the new weights
and goes on; the answer names the versions that it began and ended with, or, on a stream, the one that it began with.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse

from weightline.receiver.api import VERSION_HEADER
from weightline.receiver.auth import is_authorized, load_token
from weightline.receiver.door import build_door
from weightline.receiver.engines.vllm.engine import VllmEngine
from weightline.receiver.engines.vllm.gate import LoopGate
from weightline.receiver.engines.vllm.online import OnlineTransport
from weightline.receiver.engines.vllm.routes import RENAMED, Route, classify
from weightline.receiver.engines.vllm.settings import SETTINGS_VARIABLE, VllmSettings, build_service
from weightline.receiver.http_errors import UNAUTHORIZED, error_body
from weightline.receiver.service import ReplicaService

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

MIXING_HEADER = "x-weightline-mixing"
_RETRY_AFTER = {"retry-after": "1"}


class ReplicaMiddleware:
    """Pure ASGI, outermost of vLLM's."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._settings = VllmSettings.model_validate_json(os.environ[SETTINGS_VARIABLE])
        self._token = load_token(Path(self._settings.server.state_dir))
        self._engine: VllmEngine | None = None
        self._gate: LoopGate | None = None
        self._service: ReplicaService | None = None
        self._door: FastAPI | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(scope, receive, send)
        elif scope["type"] == "http":
            await self._answer(scope, receive, send)
        elif self._is_authorized(scope):
            await self._app(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008, "reason": "this route needs the replica's token"})

    async def _live(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the lifespan on; start once the app has started, close once it has ended."""

        async def watched(message: Message) -> None:
            if message["type"] == "lifespan.startup.complete":
                await self._start(scope["app"])
            elif message["type"].startswith("lifespan.shutdown"):
                await self._close()
            await send(message)

        await self._app(scope, receive, watched)

    async def _start(self, app: Any) -> None:
        gate = self._gate = LoopGate()
        transport = OnlineTransport(app.state.engine_client, asyncio.get_running_loop())
        engine = self._engine = VllmEngine(transport, gate, Path(self._settings.model_folder))
        service = self._service = build_service(self._settings, engine)
        self._door = build_door(service, self._token)
        await asyncio.to_thread(service.start)

    async def _close(self) -> None:
        if self._service is not None:
            await asyncio.to_thread(self._service.close)
        if self._engine is not None:
            self._engine.close()

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        route = classify(scope["method"], scope["path"])
        if route is Route.OURS and self._door is not None:
            path: str = RENAMED.get(scope["path"]) or scope["path"]
            await self._door({**scope, "path": path, "raw_path": path.encode(), "root_path": ""}, receive, send)
        elif route is Route.INFERENCE:
            await self._infer(scope, receive, send)
        elif route is Route.OPEN or self._is_authorized(scope):
            await self._app(scope, receive, send)
        else:
            body = error_body("this route needs the replica's token: Authorization: Bearer ...", UNAUTHORIZED)
            await JSONResponse(body, 401, {"www-authenticate": "Bearer"})(scope, receive, send)

    async def _infer(self, scope: Scope, receive: Receive, send: Send) -> None:
        gate, engine = self._gate, self._engine
        if gate is None or engine is None:
            await _unavailable("the replica has not started yet", scope, receive, send)
            return
        allows_mixing = _header(scope, MIXING_HEADER) == "allow"
        if engine.version is None and not self._is_loading():
            await _unavailable("no checked version is loaded: ask again after the next refresh", scope, receive, send)
            return
        async with gate.passing(holds_up=not allows_mixing):
            if engine.version is None:
                await _unavailable(
                    "no checked version is loaded: ask again after the next refresh", scope, receive, send
                )
                return
            await self._app(scope, receive, _naming_versions(engine, send))

    def _is_loading(self) -> bool:
        return self._service is not None and self._service.replica.status().state == "loading"

    def _is_authorized(self, scope: Scope) -> bool:
        return is_authorized(_header(scope, "authorization"), self._token)


def _naming_versions(engine: VllmEngine, send: Send) -> Send:
    """`send`, with a header that names the version the answer began with and, where it is another, ended with."""
    first = engine.version

    async def named(message: Message) -> None:
        if message["type"] == "http.response.start":
            last = engine.version
            versions = f"{first}" if last in (first, None) else f"{first},{last}"
            message["headers"] = [*message.get("headers", ()), (VERSION_HEADER.encode(), versions.encode())]
        await send(message)

    return named


async def _unavailable(why: str, scope: Scope, receive: Receive, send: Send) -> None:
    await JSONResponse(error_body(why, "apply"), 503, _RETRY_AFTER)(scope, receive, send)


def _header(scope: Scope, name: str) -> str | None:
    """The header's value; None for none."""
    wanted = name.encode()
    found = next((value for key, value in scope["headers"] if key.lower() == wanted), None)
    return None if found is None else found.decode("latin-1")
