"""The middleware of a vLLM server that is a replica: barrier, token, the version in its answers, its own routes.

    vllm serve ... --middleware weightline.serving.engines.vllm.middleware.ReplicaMiddleware

`weightline serve vllm` puts the replica's settings into the environment. The replica starts with the app's lifespan,
when vLLM's engine is up, and ends with it.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse
from prometheus_client import REGISTRY
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from weightline.serving.engines.barrier import AsyncRequestBarrier
from weightline.serving.engines.vllm.engine import VllmEngine
from weightline.serving.engines.vllm.gated import VersionedApp, unavailable
from weightline.serving.engines.vllm.online import OnlineTransport
from weightline.serving.engines.vllm.refused import check_config
from weightline.serving.engines.vllm.routes import RENAMED, Route, classify
from weightline.serving.engines.vllm.settings import SETTINGS_VARIABLE, VllmSettings, build_service
from weightline.serving.http.app import build_app
from weightline.serving.http.auth import is_authorized, load_token
from weightline.serving.http.errors import UNAUTHORIZED, error_body
from weightline.serving.http.service import ReplicaService

_NO_WEBSOCKETS = "no websockets here: what one answers over its life would come from several versions"


class ReplicaMiddleware:
    """Pure ASGI, outermost of vLLM's."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
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
            await self._answering(scope)(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008, "reason": _NO_WEBSOCKETS})

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
        check_config(app.state.engine_client.vllm_config)
        barrier = AsyncRequestBarrier()
        transport = OnlineTransport(app.state.engine_client, asyncio.get_running_loop())
        engine = self._engine = VllmEngine(transport, barrier, Path(self._settings.model_folder))
        service = self._service = build_service(self._settings, engine)
        self._replica_app = build_app(service, self._token)
        self._versioned = VersionedApp(self._app, barrier, engine, service.metrics.completions)
        # What vLLM shows at /metrics.
        REGISTRY.register(service.metrics.registry)
        await asyncio.to_thread(service.start)

    async def _close(self) -> None:
        if self._service is not None:
            await asyncio.to_thread(self._service.close)
        if self._engine is not None:
            self._engine.close()

    def _answering(self, scope: Scope) -> ASGIApp:
        """Who answers the request."""
        route = classify(scope["method"], scope["path"])
        if route is Route.OPEN:
            return self._app
        if route is Route.OURS:
            return _renaming(self._replica_app) if self._replica_app else unavailable("the replica has not started yet")
        if route is not Route.INFERENCE and not self._is_authorized(scope):
            body = error_body("this route needs the replica's token: Authorization: Bearer ...", UNAUTHORIZED)
            return JSONResponse(body, 401, {"www-authenticate": "Bearer"})
        if route is Route.CONTROL:
            return self._app
        return self._versioned or unavailable("the replica has not started yet")

    def _is_authorized(self, scope: Scope) -> bool:
        return is_authorized(Headers(scope=scope).get("authorization"), self._token)


def _renaming(app: FastAPI) -> ASGIApp:
    """Returns the replica's app, reached by the paths of RENAMED."""

    async def renamed(scope: Scope, receive: Receive, send: Send) -> None:
        path: str = RENAMED.get(scope["path"]) or scope["path"]
        await app({**scope, "path": path, "raw_path": path.encode(), "root_path": ""}, receive, send)

    return renamed
