"""A server in the place of a replica, for what real replicas do rarely: faults, broken answers, and versions on demand.

Its samples depend on prompt, seed and version only, as those of a replica do.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from tests.waiting import wait_until
from weightline.rollouts.sampling import seed_of

CHAIN = "memory://rollouts"
Fault = Callable[["Seam", Any], Response | None]


@dataclass
class Seam:
    """What the server serves. Tests change it while it runs."""

    name: str
    version: int | None = 0
    chain: str = CHAIN
    last_error: str | None = None
    routes: tuple[str, ...] = ("/weightline/rollouts",)
    logprobs_mode: str | None = "processed_logprobs"
    max_model_len: int | None = None
    faults: deque[Fault] = field(default_factory=deque)
    """What becomes of the next requests for samples, one each."""
    asked: list[dict[str, Any]] = field(default_factory=list)
    """The bodies of requests for samples."""
    headers: list[dict[str, str]] = field(default_factory=list)
    num_looks: int = 0
    gate: threading.Event = field(default_factory=threading.Event)
    """Requests for samples are answered while it is set."""
    url: str = ""

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        """The samples of a body: two tokens each."""
        assert self.version is not None
        groups = [
            [sample_of(prompt, seed, number, self.version) for number in range(body["n"])]
            for prompt, seed in zip(body["prompts"], body["seed"], strict=True)
        ]
        return {"version": self.version, "samples": groups}


def sample_of(prompt: list[int], seed: int, number: int, version: int) -> dict[str, Any]:
    drawn = seed_of(*prompt, seed, number, version) % 1000
    return {"token_ids": [drawn, 7], "logprobs": [-drawn / 1024, -0.5], "finish_reason": "stop"}


def refuse(status: int, headers: dict[str, str] | None = None) -> Fault:
    """A fault: this status, with an error as replicas send it."""
    body = {"error": {"message": f"refused with {status}", "code": f"http-{status}", "facts": {}}}
    return lambda seam, asked: JSONResponse(body, status, headers)


def answering(change: Callable[[dict[str, Any]], Any]) -> Fault:
    """A fault: the right answer, changed."""

    def changed(seam: Seam, asked: dict[str, Any]) -> Response:
        body = seam.answer(asked)
        found = change(body)
        return JSONResponse(body if found is None else found)

    return changed


def cut(seam: Seam, asked: dict[str, Any]) -> Response:
    """A fault: the connection ends in the middle of the answer."""

    async def half() -> AsyncIterator[bytes]:
        yield b'{"version": 0, "samp'
        raise ConnectionError("cut by the test")

    return StreamingResponse(half(), media_type="application/json")


@contextmanager
def serving(seam: Seam, port: int = 0) -> Iterator[Seam]:
    """Serves it until the context ends. The port stays free for a restart."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", port))
    listener.listen(64)
    seam.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    seam.gate.set()
    config = uvicorn.Config(_app(seam), log_level="critical", timeout_graceful_shutdown=0)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        wait_until(lambda: server.started)
        yield seam
    finally:
        server.should_exit = server.force_exit = True
        thread.join(20)
        listener.close()


def _app(seam: Seam) -> Starlette:
    async def status(_: Request) -> Response:
        return JSONResponse(
            {
                "replica": seam.name, "chain": seam.chain, "version": seam.version, "last_error": seam.last_error,
                "rollout_routes": list(seam.routes), "logprobs_mode": seam.logprobs_mode,
                "max_model_len": seam.max_model_len,
            }
        )  # fmt: skip

    async def version(request: Request) -> Response:
        seam.num_looks += 1
        at_least, end = int(request.query_params["min"]), asyncio.get_running_loop().time() + 2.0
        while (seam.version is None or seam.version < at_least) and asyncio.get_running_loop().time() < end:
            await asyncio.sleep(0.01)
        return JSONResponse(
            {"version": seam.version, "commit_id": None, "moving_to": None, "last_error": seam.last_error}
        )

    async def rollouts(request: Request) -> Response:
        asked = await request.json()
        seam.asked.append(asked)
        seam.headers.append(dict(request.headers))
        while not seam.gate.is_set():
            await asyncio.sleep(0.01)
        if seam.faults and (answer := seam.faults.popleft()(seam, asked)) is not None:
            return answer
        held = {} if seam.version is None else {"x-weightline-version": str(seam.version)}
        if seam.version is None or seam.version < int(request.headers["x-weightline-min-version"]):
            return JSONResponse({"error": {"message": "not served", "code": "version-not-served"}}, 409, held)
        return JSONResponse(seam.answer(asked), headers=held)

    return Starlette(
        routes=[
            Route("/weightline/status", status),
            Route("/weightline/version", version),
            Route("/weightline/rollouts", rollouts, methods=["POST"]),
        ]
    )
