"""The HTTP app of a replica: a subset of OpenAI's completions and chat API, rollouts, its status, and the refresh.

Slow work runs on threads with limits per kind, so that a queue of completions delays neither a refresh nor a status
request.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Annotated, Any, TypeVar

import anyio
from anyio import CapacityLimiter
from fastapi import Depends, FastAPI, HTTPException, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import Field
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.types import Scope

from weightline.chain.read.history import is_same_chain
from weightline.errors import (
    ApplyError,
    ErrorKind,
    InputError,
    NotFoundError,
    VersionNotServedError,
    WeightlineError,
    http_status,
)
from weightline.serving.engines.base import Generation, GenerationRequest, VersionBounds
from weightline.serving.http.auth import is_authorized
from weightline.serving.http.bounds import BoundedApp
from weightline.serving.http.errors import UNAUTHORIZED, error_body
from weightline.serving.http.names import COMPLETIONS_ROUTE, ROLLOUTS_ROUTE, VERSION_HEADER
from weightline.serving.http.openai import Body, ChatRequest, CompletionRequest, Text
from weightline.serving.http.rollouts import RolloutRequest
from weightline.serving.http.service import ReplicaService
from weightline.serving.http.versions import (
    MAX_WAIT_SECONDS,
    AskedVersion,
    VersionWaits,
    asked_version,
    not_served,
)
from weightline.serving.http.weight_push import PUSH_ROUTES, weight_push_refused

VERSION_ROUTE = "/weightline/version"
#: Completions that may wait for the engine. Further ones are refused with a status that allows a retry.
MAX_WAITING_COMPLETIONS = 256
_REFRESH = "/weightline/refresh"
#: The routes that take a body, and how large it may be: a million tokens of text, millions of ids, one small object.
_MAX_BODY_NBYTES = {
    ("POST", COMPLETIONS_ROUTE): 8 * 1024 * 1024,
    ("POST", "/v1/chat/completions"): 8 * 1024 * 1024,
    ("POST", ROLLOUTS_ROUTE): 32 * 1024 * 1024,
    ("POST", _REFRESH): 64 * 1024,
}

T = TypeVar("T")


class RefreshRequest(Body):
    """The body of POST /weightline/refresh. `version` null means the tip; an earlier version needs `allow_backward`.

    `chain` is the URL of the chain that the caller expects. Any other than the replica's own is refused.
    """

    chain: Text | None = None
    version: Annotated[int, Field(ge=0)] | None = None
    allow_backward: bool = False


def build_app(service: ReplicaService, token: str) -> FastAPI:
    """Returns the app. The server starts and stops the service; the routes do neither."""
    app = FastAPI(title="weightline replica", docs_url=None, redoc_url=None, openapi_url=None)
    _add_completions(app, service)
    _add_status(app, service)
    _add_refresh(app, service, token)
    _add_errors(app)
    for method, path in PUSH_ROUTES:
        app.add_route(path, weight_push_refused, methods=[method])

    def lacks_token(scope: Scope) -> bool:
        is_guarded = scope["method"] == "POST" and scope["path"].rstrip("/") == _REFRESH
        return is_guarded and not is_authorized(Headers(scope=scope).get("authorization"), token)

    app.add_middleware(BoundedApp, max_body_nbytes=_MAX_BODY_NBYTES, is_refused=lacks_token)
    return app


def _add_completions(app: FastAPI, service: ReplicaService) -> None:
    replica, threads = service.replica, CapacityLimiter(MAX_WAITING_COMPLETIONS)
    waits = VersionWaits(replica.watch, lambda: replica.version)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        model = {"id": replica.chain.name, "object": "model", "owned_by": "weightline", "root": replica.chain.url}
        return {"object": "list", "data": [model | {"weightline_version": replica.version}]}

    @app.post(COMPLETIONS_ROUTE)
    async def completions(body: CompletionRequest, http: Request) -> JSONResponse:
        return await converse(body, http)

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatRequest, http: Request) -> JSONResponse:
        return await converse(body, http)

    @app.post(ROLLOUTS_ROUTE)
    async def rollouts(body: RolloutRequest, http: Request) -> JSONResponse:
        return await answer(body.to_generation(), body.answer, http)

    async def converse(body: CompletionRequest | ChatRequest, http: Request) -> JSONResponse:
        if body.model not in (None, replica.chain.name):
            raise NotFoundError(
                f"no model {body.model!r} here; this replica serves {replica.chain.name!r}", key=body.model
            )
        return await answer(body.to_generation(), lambda found: body.answer(found, replica.chain.name), http)

    async def answer(
        request: GenerationRequest, body_of: Callable[[Generation], dict[str, Any]], http: Request
    ) -> JSONResponse:
        asked = asked_version(http.headers)
        bounded = replace(request, bounds=asked.bounds)
        generation = await waits.answered(asked, lambda: generate(bounded), http.receive)
        service.metrics.completions.inc(len(request.prompts))
        return JSONResponse(body_of(generation), headers={VERSION_HEADER: str(generation.version)})

    async def generate(request: GenerationRequest) -> Generation:
        if replica.status().state == "waiting" and request.bounds.accept_all:
            raise ApplyError(_why_waiting(service), version=None)
        if threads.available_tokens < 1:
            raise ApplyError(f"{MAX_WAITING_COMPLETIONS} requests are waiting already: send it again later")
        return await _on_thread(threads, lambda: replica.engine.generate(request))


def _add_status(app: FastAPI, service: ReplicaService) -> None:
    replica, threads = service.replica, CapacityLimiter(4)
    polls = VersionWaits(replica.watch, lambda: replica.status().version)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        """Answers 200 while the process lives. `status` and /ready say whether it serves a version."""
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

    @app.get(VERSION_ROUTE)
    async def version(
        http: Request,
        lowest: Annotated[int, Query(alias="min", ge=0, lt=2**63)] = 0,
        wait: Annotated[float, Query(ge=0, le=MAX_WAIT_SECONDS)] = 0.0,
    ) -> dict[str, Any]:
        """Answers once a version of at least `min` is served, and after `wait` seconds with what is served then."""
        bounds = VersionBounds(lowest)

        async def check() -> None:
            bounds.require(replica.status().version)

        with suppress(VersionNotServedError):
            await polls.answered(AskedVersion(bounds, wait), check, http.receive)
        return service.served_version().model_dump()

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.render(), media_type=CONTENT_TYPE_LATEST)


def _add_refresh(app: FastAPI, service: ReplicaService, token: str) -> None:
    threads = CapacityLimiter(4)

    def require_token(request: Request) -> None:
        if not is_authorized(request.headers.get("authorization"), token):
            raise HTTPException(401, "this route needs the replica's token: Authorization: Bearer ...")

    @app.post(_REFRESH, dependencies=[Depends(require_token)])
    async def refresh(body: RefreshRequest) -> dict[str, Any]:
        _require_chain(body.chain, service.replica.chain.url)
        facts = await _on_thread(threads, lambda: service.refresh(body.version, allow_backward=body.allow_backward))
        return facts.model_dump()


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(WeightlineError)
    async def weightline_error(_: Request, error: WeightlineError) -> JSONResponse:
        if isinstance(error, VersionNotServedError):
            return not_served(error)
        return JSONResponse(error_body(str(error), str(error.kind), error.facts), http_status(error))

    @app.exception_handler(RequestValidationError)
    async def bad_body(_: Request, error: RequestValidationError) -> JSONResponse:
        return JSONResponse(_refusal(error), http_status(InputError("")))

    @app.exception_handler(StarletteHTTPException)
    async def http_error(_: Request, error: StarletteHTTPException) -> JSONResponse:
        code = UNAUTHORIZED if error.status_code == 401 else f"http-{error.status_code}"
        headers = {"www-authenticate": "Bearer"} if error.status_code == 401 else None
        return JSONResponse(error_body(str(error.detail), code), error.status_code, headers=headers)


def _require_chain(expected: str | None, configured: str) -> None:
    """Raises InputError for a refresh of another chain, since a replica reads no bucket but its own."""
    if expected is not None and not is_same_chain(expected, configured):
        raise InputError(f"this replica follows {configured}, not {expected}", field="chain", chain=configured)


def _refusal(error: RequestValidationError) -> dict[str, Any]:
    """Returns an error body that names the first invalid field and the remedy."""
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"][1:2]) or "body"
    remedy = {"extra_forbidden": "this server does not support it", "literal_error": f"{first['msg']}"}
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
