"""The web app: static files, JSON documents, and a stream of changes. It reads buckets and writes nothing."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request
from fastapi import Path as InPath
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from fastapi.staticfiles import StaticFiles
from starlette.datastructures import MutableHeaders
from starlette.middleware.gzip import GZipMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from weightline.dashboard.board import Board
from weightline.dashboard.detail import comparison_page, samples_page, version_page
from weightline.dashboard.index import ChainIndex
from weightline.dashboard.layers import layer_picture
from weightline.dashboard.pages import card, glance, unshown_card, window
from weightline.dashboard.plain import PlainResponse
from weightline.dashboard.series import series
from weightline.errors import CorruptError, InputError, NotFoundError, WeightlineError, http_status
from weightline.format.manifest import Manifest
from weightline.lineage.samples import read_samples
from weightline.serving.http.bounds import BoundedApp

logger = logging.getLogger(__name__)
STATIC = Path(__file__).parent / "static"
MAX_WINDOW = 500
_POLICY = "default-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
_HEADERS = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
}

Version = Annotated[int, Query(ge=0)]


class HardenMiddleware:
    """Adds security headers to every response, so that browsers load only this app's own files."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def hardened(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(_HEADERS)
                headers.setdefault("cache-control", "no-cache")
            await send(message)

        await self._app(scope, receive, hardened if scope["type"] == "http" else send)


def make_app(board: Board, *, prefect_ui: str | None = None, hosts: Sequence[str] = ("*",)) -> FastAPI:
    """Returns the app of a board.

    `prefect_ui`: URL of a Prefect UI, to which runs link. `hosts`: host names for which requests are answered.
    """

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        following = asyncio.create_task(board.follow())
        yield
        following.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await following
        board.close()

    app = FastAPI(title="weightline", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(GZipMiddleware, minimum_size=2_000)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))
    app.add_middleware(HardenMiddleware)
    # No route takes a body, so none is read.
    app.add_middleware(BoundedApp, max_body_nbytes={})
    app.add_exception_handler(WeightlineError, _error_response)
    app.add_exception_handler(RequestValidationError, _validation_response)
    _add_shell(app)
    _add_chains(app, board)
    _add_versions(app, board, prefect_ui)
    _add_events(app, board)
    app.mount("/static", StaticFiles(directory=STATIC), name="static")
    return app


def _add_shell(app: FastAPI) -> None:
    @app.get("/", include_in_schema=False)
    def shell() -> FileResponse:
        return FileResponse(STATIC / "index.html", media_type="text/html")


def _add_chains(app: FastAPI, board: Board) -> None:
    @app.get("/api/chains")
    def chains() -> PlainResponse:
        cards = [safe_card(identifier, index) for identifier, index in list(board.indexes.items())]
        return PlainResponse({"buckets": list(board.urls), "chains": cards, "num_left_out": board.num_left_out})

    @app.get("/api/chains/{identifier}/glance")
    def chain_glance(identifier: str, bins: Annotated[int, Query(ge=1, le=2_000)] = 400) -> PlainResponse:
        return PlainResponse(glance(board.index(identifier).snapshot, bins))

    @app.get("/api/chains/{identifier}/window")
    def chain_window(identifier: str, first: Version, last: Version) -> PlainResponse:
        index = board.index(identifier)
        shown = window(index.snapshot, first, min(last, first + MAX_WINDOW - 1), _forks_of(board, index))
        return PlainResponse(shown)

    @app.get("/api/chains/{identifier}/series")
    def chain_series(
        identifier: str,
        name: Annotated[list[str], Query(max_length=40)],
        first: Version = 0,
        last: Annotated[int | None, Query(ge=0)] = None,
        points: Annotated[int, Query(ge=2, le=2_000)] = 500,
    ) -> PlainResponse:
        snapshot = board.index(identifier).snapshot
        rows = snapshot.window(first, snapshot.tip or 0 if last is None else last)
        return PlainResponse(series(rows, name, points))


def _add_versions(app: FastAPI, board: Board, prefect_ui: str | None) -> None:
    @app.get("/api/chains/{identifier}/versions/{version}")
    def one_version(identifier: str, version: int) -> PlainResponse:
        index = board.index(identifier)
        manifest = index.manifest(version)
        return PlainResponse(version_page(index.snapshot, manifest, _base_of(index, manifest), prefect_ui))

    @app.get("/api/chains/{identifier}/versions/{version}/rollouts")
    def samples_of(identifier: str, version: Annotated[int, InPath(ge=0)]) -> PlainResponse:
        """The record is read when a browser asks for it, since the index keeps none of this size."""
        return PlainResponse(samples_page(*read_samples(board.index(identifier).chain, version)))

    @app.get("/api/chains/{identifier}/compare")
    def compare(identifier: str, a: Version, b: Version) -> PlainResponse:
        index = board.index(identifier)
        return PlainResponse(comparison_page(index.snapshot, index.manifest(a), index.manifest(b)))

    @app.get("/api/chains/{identifier}/differing")
    def differing(identifier: str, a: Version, b: Version) -> PlainResponse:
        index = board.index(identifier)
        tensors = board.differing.count(index.chain, index.manifest(a), index.manifest(b))
        return PlainResponse(
            {
                "num_changed": sum(tensor.num_changed or 0 for tensor in tensors),
                "num_elements": sum(tensor.num_elements for tensor in tensors),
                "layers": layer_picture(tensors),
            }
        )


def _add_events(app: FastAPI, board: Board) -> None:
    @app.get("/api/events")
    async def events() -> StreamingResponse:
        """Server-sent events: the generation of every chain, now and after every change."""

        async def stream() -> AsyncIterator[str]:
            yield "retry: 2000\n\n"
            async for generations in board.changes():
                yield f"data: {json.dumps(generations)}\n\n"

        return StreamingResponse(stream(), media_type="text/event-stream")


def safe_card(identifier: str, index: ChainIndex) -> dict[str, Any]:
    """Returns the chain's card. A chain of which none can be drawn is shown with the reason, beside the others."""
    try:
        return card(identifier, index.chain.name, index.chain.url, index.snapshot)
    except Exception as error:
        logger.exception("%s cannot be shown", index.chain.url)
        return unshown_card(
            identifier, index.chain.name, index.chain.url, f"{index.chain.url} cannot be shown: {error}"
        )


def _base_of(index: ChainIndex, manifest: Manifest) -> Manifest | None:
    """Returns the base version's manifest; None when there is none, or it cannot be read any more."""
    if manifest.base_version is None:
        return None
    try:
        return index.manifest(manifest.base_version)
    except (NotFoundError, CorruptError):
        return None


def _forks_of(board: Board, origin: ChainIndex) -> dict[int, list[str]]:
    """Returns, by version of `origin`, the ids of the chains that start from it."""
    found: dict[int, list[str]] = {}
    for identifier, index in list(board.indexes.items()):
        first = index.snapshot.row(0)
        if first is not None and first.forked_from is not None and first.forked_from.chain == origin.chain.url:
            found.setdefault(first.forked_from.version, []).append(identifier)
    return found


def _error_response(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, WeightlineError)
    return PlainResponse({"error": {"kind": error.kind, "message": str(error)}}, http_status(error))


def _validation_response(request: Request, error: Exception) -> JSONResponse:
    """Returns the response to an invalid parameter, in the form of an InputError that names the parameter."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    field = str(first["loc"][-1])
    return _error_response(request, InputError(f"{field}: {first['msg']}", field=field))
