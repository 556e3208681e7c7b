"""The HTTP door of a replica: completions for everybody who reaches it, refreshes for who has the token.

Slow work runs on threads with limits of their own, so a queue of completions never keeps a refresh or a status waiting.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import anyio
from anyio import CapacityLimiter
from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException as StarletteHTTPException

from weightline.errors import ApplyError, ErrorKind, InputError, NotFoundError, WeightlineError
from weightline.serving.http.api import VERSION_HEADER, CompletionRequest, RefreshRequest, completion_body
from weightline.serving.http.auth import is_authorized
from weightline.serving.http.http_errors import UNAUTHORIZED, error_body, status_of
from weightline.serving.http.service import ReplicaService

T = TypeVar("T")

#: Completions that may wait for the engine; more are told to come back.
MAX_WAITING_COMPLETIONS = 256


def build_door(service: ReplicaService, token: str) -> FastAPI:
    """The app. Its routes start nothing and stop nothing: the server owns the service."""
    app = FastAPI(title="weightline replica", docs_url=None, redoc_url=None, openapi_url=None)
    _add_completions(app, service)
    _add_looks(app, service)
    _add_refresh(app, service, token)
    _add_errors(app)
    return app


def _add_completions(app: FastAPI, service: ReplicaService) -> None:
    replica, threads = service.replica, CapacityLimiter(MAX_WAITING_COMPLETIONS)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        model = {"id": replica.chain.name, "object": "model", "owned_by": "weightline", "root": replica.chain.url}
        return {"object": "list", "data": [model | {"weightline_version": replica.version}]}

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest) -> JSONResponse:
        if body.model not in (None, replica.chain.name):
            raise NotFoundError(
                f"no model {body.model!r} here; this replica serves {replica.chain.name!r}", key=body.model
            )
        if replica.status().state == "waiting":
            raise ApplyError(_why_waiting(service), version=None)
        if threads.available_tokens < 1:
            raise ApplyError(f"{MAX_WAITING_COMPLETIONS} requests are waiting already: ask again later")
        request = body.to_generation()
        generation = await _on_thread(threads, lambda: replica.engine.generate(request))
        service.metrics.completions.inc(len(generation.completions))
        return JSONResponse(
            completion_body(generation, replica.chain.name), headers={VERSION_HEADER: str(generation.version)}
        )


def _add_looks(app: FastAPI, service: ReplicaService) -> None:
    replica, threads = service.replica, CapacityLimiter(4)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        """200 as long as the process answers; whether it serves is in `status`, and in /ready."""
        status = replica.status()
        detail = None if status.state == "serving" else _why_waiting(service)
        return {"status": status.state, "version": status.version, "detail": detail}

    @app.get("/ready")
    async def ready() -> JSONResponse:
        status = replica.status()
        return JSONResponse({"status": status.state, "version": status.version}, 503 if status.version is None else 200)

    @app.get("/weightline/status")
    async def status() -> dict[str, Any]:
        return (await _on_thread(threads, service.status)).model_dump()

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.render(), media_type=CONTENT_TYPE_LATEST)


def _add_refresh(app: FastAPI, service: ReplicaService, token: str) -> None:
    threads = CapacityLimiter(4)

    def require_token(request: Request) -> None:
        if not is_authorized(request.headers.get("authorization"), token):
            raise HTTPException(401, "this route needs the replica's token: Authorization: Bearer ...")

    @app.post("/weightline/refresh", dependencies=[Depends(require_token)])
    async def refresh(body: RefreshRequest) -> dict[str, Any]:
        _require_chain(body.chain, service.replica.chain.url)
        facts = await _on_thread(threads, lambda: service.refresh(body.version, allow_backward=body.allow_backward))
        return facts.model_dump()


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(WeightlineError)
    async def weightline_error(_: Request, error: WeightlineError) -> JSONResponse:
        return JSONResponse(error_body(str(error), str(error.kind), error.facts), status_of(error))

    @app.exception_handler(RequestValidationError)
    async def bad_body(_: Request, error: RequestValidationError) -> JSONResponse:
        return JSONResponse(_refusal(error), status_of(InputError("")))

    @app.exception_handler(StarletteHTTPException)
    async def http_error(_: Request, error: StarletteHTTPException) -> JSONResponse:
        code = UNAUTHORIZED if error.status_code == 401 else f"http-{error.status_code}"
        headers = {"www-authenticate": "Bearer"} if error.status_code == 401 else None
        return JSONResponse(error_body(str(error.detail), code), error.status_code, headers=headers)


def _require_chain(asked: str | None, configured: str) -> None:
    """A replica never reads another bucket than its own, whoever asks."""
    if asked is not None and asked.rstrip("/") != configured.rstrip("/"):
        raise InputError(f"this replica follows {configured}, not {asked}", field="chain", chain=configured)


def _refusal(error: RequestValidationError) -> dict[str, Any]:
    """Names the first wrong field of a body and what would be right."""
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"][1:2]) or "body"
    remedy = {"extra_forbidden": "this server does not know it", "literal_error": f"{first['msg']}"}
    problem = remedy.get(first["type"], first["msg"])
    if field == "stream":
        problem = "streaming is not supported: leave it out"
    return error_body(f"{field}: {problem}", str(ErrorKind.INPUT), {"field": field})


def _why_waiting(service: ReplicaService) -> str:
    status = service.replica.status()
    if status.state == "loading":
        return "a version is being loaded"
    because = f": {status.last_error}" if status.last_error else ""
    return f"no checked version of {status.chain} is loaded yet{because}"


async def _on_thread(threads: CapacityLimiter, work: Callable[[], T]) -> T:
    return await anyio.to_thread.run_sync(work, limiter=threads)
