"""The HTTP app of a front: the routes that it forwards, the versions behind it, and its own status."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime

import httpx
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel, Field, ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from weightline.errors import InputError, WeightlineError, http_status
from weightline.front.affinity import Ranking, ranked
from weightline.front.forward import Forwarder
from weightline.front.metrics import FrontMetrics
from weightline.front.replicas import Replicas
from weightline.front.settings import FrontSettings
from weightline.serving.engines.base import VersionBounds
from weightline.serving.http.bounds import BoundedApp
from weightline.serving.http.errors import error_body
from weightline.serving.http.names import COMPLETIONS_ROUTE, GENERATE_ROUTE, KEEPALIVE_SECONDS, ROLLOUTS_ROUTE
from weightline.serving.http.versions import MAX_WAIT_SECONDS, AskedVersion
from weightline.serving.http.weight_push import PUSH_ROUTES, weight_push_refused

#: A body of the largest route of the embedded server.
MAX_BODY_NBYTES = 32 * 1024 * 1024
#: The routes that are forwarded. Those that move a replica or show its insides are not: they need the replica's token.
GENERATING = (COMPLETIONS_ROUTE, "/v1/chat/completions", GENERATE_ROUTE, ROLLOUTS_ROUTE)
FORWARDED = (*GENERATING, "/tokenize", "/detokenize")
_CONNECT_SECONDS = 5.0
_MAX_CONNECTIONS = 1024

Handler = Callable[[Request], Awaitable[Response]]


def build_app(settings: FrontSettings, rank: Ranking = ranked) -> ASGIApp:
    """Returns the app, which finds and watches the replicas between its start and its end.

    `rank` orders the replicas for each key; the benchmark gives another order for comparison.
    """
    front = Front(settings, rank)
    app = Starlette(
        routes=[
            *(Route(path, front.forward, methods=["POST"]) for path in FORWARDED),
            Route("/v1/models", front.forward, methods=["GET"]),
            Route("/weightline/status", front.replica_status, methods=["GET"]),
            Route("/weightline/version", front.version, methods=["GET"]),
            Route("/weightline/front", front.status, methods=["GET"]),
            Route("/health", front.health, methods=["GET"]),
            Route("/ready", front.ready, methods=["GET"]),
            Route("/metrics", front.metrics, methods=["GET"]),
            *(Route(path, weight_push_refused, methods=[method]) for method, path in PUSH_ROUTES),
        ],
        exception_handlers={WeightlineError: _weightline_error, HTTPException: _http_error},
        lifespan=front.lifespan,
    )
    return BoundedApp(app, max_body_nbytes={("POST", path): MAX_BODY_NBYTES for path in FORWARDED})


class Front:
    """The handlers of the routes, and what they share."""

    def __init__(self, settings: FrontSettings, rank: Ranking) -> None:
        self._settings, self._metrics = settings, FrontMetrics()
        self._began_at = datetime.now(UTC)
        limits = httpx.Limits(
            max_connections=_MAX_CONNECTIONS, max_keepalive_connections=256, keepalive_expiry=KEEPALIVE_SECONDS
        )
        timeout = httpx.Timeout(settings.answer_seconds, connect=_CONNECT_SECONDS)
        self._client = httpx.AsyncClient(limits=limits, timeout=timeout, trust_env=False)
        self._replicas = Replicas(settings.open_chain(), settings.replica_urls, self._client, self._metrics, rank)
        self._forwarder = Forwarder(self._replicas, self._client, self._metrics, retry_seconds=settings.retry_seconds)

    @asynccontextmanager
    async def lifespan(self, _: Starlette) -> AsyncIterator[None]:
        """Finds and watches the replicas for the length of the block."""
        async with self._client:
            running = asyncio.create_task(self._replicas.run())
            try:
                yield
            finally:
                running.cancel()
                with suppress(asyncio.CancelledError):
                    await running

    async def forward(self, request: Request) -> Response:
        return await self._forwarder.answer(request)

    async def replica_status(self, request: Request) -> Response:
        """The status of a replica that serves the newest version behind the front."""
        newest = self._replicas.newest()
        return await self._forwarder.answer(request, AskedVersion(VersionBounds(newest.version if newest else None)))

    async def version(self, request: Request) -> Response:
        """The newest version behind the front, as soon as it is at least `min`, or at the end of `wait`."""
        query = _parse_query(dict(request.query_params))
        bounds, deadline = VersionBounds(query.min), time.monotonic() + query.wait
        while not self._replicas.serve(bounds) and (left := deadline - time.monotonic()) > 0:
            await self._replicas.changed(left)
        newest = self._replicas.newest()
        facts = None if newest is None else newest.facts
        if facts is None:
            return JSONResponse({"version": None, "commit_id": None, "moving_to": None, "last_error": self._trouble()})
        return JSONResponse(facts.model_dump())

    async def status(self, _: Request) -> Response:
        """What the front knows and did: replicas, versions, requests, retries, hits."""
        metrics = self._metrics
        return JSONResponse(
            {
                "front": self._settings.name,
                "chain": self._settings.chain_url,
                "started_at": self._began_at.isoformat(timespec="seconds"),
                **self._replicas.status(),
                "requests": metrics.num_requests,
                "retries": {"total": metrics.num_retries, **metrics.retries_by_reason},
                "affinity": {"home": metrics.num_home, "elsewhere": metrics.num_elsewhere},
            }
        )

    async def health(self, _: Request) -> Response:
        """Answers 200 while the process lives."""
        newest = self._replicas.newest()
        status = "waiting" if newest is None else "serving"
        version = None if newest is None else newest.version
        return JSONResponse({"status": status, "version": version, "detail": None if newest else self._trouble()})

    async def ready(self, _: Request) -> Response:
        newest = self._replicas.newest()
        if newest is None:
            return JSONResponse({"status": "waiting", "version": None}, 503)
        return JSONResponse({"status": "serving", "version": newest.version})

    async def metrics(self, _: Request) -> Response:
        return Response(self._metrics.render(), media_type=CONTENT_TYPE_LATEST)

    def _trouble(self) -> str:
        reasons = self._replicas.reasons()
        return ", ".join(f"{name}: {why}" for name, why in sorted(reasons.items())) or "no replica has a lease"


class _VersionQuery(BaseModel):
    """The query of GET /weightline/version."""

    min: int = Field(default=0, ge=0, lt=2**63)
    wait: float = Field(default=0.0, ge=0, le=MAX_WAIT_SECONDS)


def _parse_query(query: dict[str, str]) -> _VersionQuery:
    try:
        return _VersionQuery.model_validate(query)
    except ValidationError as error:
        first = error.errors()[0]
        field = str(first["loc"][0])
        raise InputError(f"{field}: {first['msg']}", field=field) from error


async def _weightline_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, WeightlineError)
    return JSONResponse(error_body(str(error), str(error.kind), error.facts), http_status(error))


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    why = str(error.detail)
    if error.status_code == 404:
        why = f"a front forwards {', '.join(FORWARDED)}: send {request.url.path} to a replica"
    return JSONResponse(error_body(why, f"http-{error.status_code}"), error.status_code)
