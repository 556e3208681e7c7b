"""A client of one episode in an OpenEnv server that survives the end and the restart of that server.

OpenEnv's protocol is JSON over one WebSocket an episode: `reset`, then `step` until the environment says that it is
done. A server keeps the state of an episode in memory, so an episode dies with its connection. Here the client keeps
what it sent. When a connection breaks it opens another one and sends all of it again: an environment that is
deterministic by its seed then stands where it stood, and no token of the model is lost. The replies are compared with
those of the first time. If one differs, the environment is not deterministic, and the episode fails.

This module speaks the protocol itself, because importing the client of the package `openenv` takes eight seconds of CPU
time and 200 MiB in every rank (it imports gradio and an MCP server). tests/environments compares the two.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import WebSocketException

from weightline.errors import InputError, RolloutError
from weightline.serving.http.auth import is_loopback

_log = logging.getLogger(__name__)
#: Replies of an environment that holds more than this are refused.
MAX_REPLY_NBYTES = 4 * 1024 * 1024
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.1, 2.0
_CAPACITY_REACHED = "CAPACITY_REACHED"


@dataclass(frozen=True, slots=True)
class Step:
    """What an environment answers to a reset or an action."""

    observation: Mapping[str, Any]
    reward: float | None
    """Reward of this action alone; None where the environment gives none."""
    is_done: bool


class _AwayError(Exception):
    """The server is not reachable, ended in the middle of a message, or is full: worth another try."""


class RemoteEnvironment:
    """One episode in the OpenEnv server at `url`, as an asynchronous context manager.

    A server that is away is tried again for `deadline_seconds`, counted from the first failure of a message; then
    RolloutError names it. `headers` are sent when a connection is opened, such as the token of a private Space.
    """

    def __init__(
        self,
        url: str,
        *,
        headers: Mapping[str, str] | None = None,
        deadline_seconds: float = 120.0,
        message_seconds: float = 30.0,
    ) -> None:
        self.url = url
        self._address = websocket_address(url)
        self._headers = dict(headers or {})
        self._deadline_seconds, self._message_seconds = deadline_seconds, message_seconds
        self._connection: ClientConnection | None = None
        self._exchanges: list[tuple[str, str]] = []
        """Messages of this episode, each with its reply."""
        self.num_reconnects = 0

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._drop()

    async def reset(self, seed: int, **options: Any) -> Step:
        """Begins the episode of a seed. The one before it, if any, is given up."""
        self._exchanges.clear()
        return await self._send({"type": "reset", "data": {"seed": seed} | options})

    async def step(self, action: Mapping[str, Any]) -> Step:
        """Does one action. InputError before the first `reset`."""
        if not self._exchanges:
            raise InputError("an episode begins with a reset", field="environment")
        return await self._send({"type": "step", "data": dict(action)})

    async def _send(self, message: Mapping[str, Any]) -> Step:
        text = json.dumps(message)
        gives_up_at, pause_seconds = float("inf"), _FIRST_PAUSE_SECONDS
        while True:
            try:
                reply = await self._exchange(await self._at_the_present_state(), text)
            except _AwayError as error:
                await self._drop()
                now = time.monotonic()
                gives_up_at = min(gives_up_at, now + self._deadline_seconds)
                if now + pause_seconds > gives_up_at:
                    raise RolloutError(
                        f"the environment at {self.url} did not answer within {self._deadline_seconds:g} s: {error}"
                    ) from error
                await asyncio.sleep(pause_seconds)
                pause_seconds = min(2 * pause_seconds, _LONGEST_PAUSE_SECONDS)
            else:
                self._exchanges.append((text, reply))
                return parse_step(reply, self.url)

    async def _at_the_present_state(self) -> ClientConnection:
        """Returns a connection whose episode stands where this one stands."""
        if self._connection is not None:
            return self._connection
        connection = self._connection = await self._connect()
        if self._exchanges:
            self.num_reconnects += 1
            _log.info("the environment at %s is back: %d messages are sent again", self.url, len(self._exchanges))
        for text, earlier in self._exchanges:
            if await self._exchange(connection, text) != earlier:
                await self._drop()
                raise RolloutError(
                    f"the environment at {self.url} answered differently when an episode was repeated with its seed"
                )
        return connection

    async def _connect(self) -> ClientConnection:
        host = urlsplit(self._address).hostname or ""
        try:
            return await connect(
                self._address,
                additional_headers=self._headers,
                max_size=MAX_REPLY_NBYTES,
                open_timeout=self._message_seconds,
                close_timeout=1.0,
                proxy=None if is_loopback(host) else True,
            )
        except (OSError, TimeoutError, WebSocketException) as error:
            raise _AwayError(_described(error)) from error

    async def _exchange(self, connection: ClientConnection, text: str) -> str:
        """Sends one message and returns the reply. RolloutError for a reply that says that the message was wrong."""
        try:
            async with asyncio.timeout(self._message_seconds):
                await connection.send(text)
                reply = await connection.recv()
        except (OSError, TimeoutError, WebSocketException) as error:
            raise _AwayError(_described(error)) from error
        if not isinstance(reply, str):
            raise RolloutError(f"the environment at {self.url} sent bytes where OpenEnv sends text")
        code, why = error_of(reply)
        if code == _CAPACITY_REACHED:
            raise _AwayError(why)
        if code is not None:
            raise RolloutError(f"the environment at {self.url} refused a message: {why} ({code})")
        return reply

    async def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.close()


def websocket_address(url: str) -> str:
    """Returns the address of an OpenEnv server's WebSocket. InputError for a URL that is none. Pure."""
    parts = urlsplit(url)
    scheme = {"http": "ws", "https": "wss", "ws": "ws", "wss": "wss"}.get(parts.scheme)
    if scheme is None or not parts.hostname:
        raise InputError(f"{url!r} is no URL of an environment: name one as in http://127.0.0.1:8010", field="url")
    return f"{scheme}://{parts.netloc}{parts.path.rstrip('/')}/ws"


def error_of(reply: str) -> tuple[str | None, str]:
    """Returns code and text of a reply that reports an error; (None, "") for any other. Pure."""
    body = _object(reply)
    if body.get("type") != "error":
        return None, ""
    data = body.get("data")
    facts = data if isinstance(data, dict) else {}
    return str(facts.get("code", "UNKNOWN")), str(facts.get("message", ""))[:500]


def parse_step(reply: str, url: str) -> Step:
    """Parses the reply to a reset or a step. RolloutError when it is none. Pure."""
    data = _object(reply).get("data")
    facts = data if isinstance(data, dict) else {}
    observation, reward, is_done = facts.get("observation"), facts.get("reward"), facts.get("done", False)
    is_number = isinstance(reward, int | float)
    if not isinstance(observation, dict) or not (reward is None or is_number) or not isinstance(is_done, bool):
        raise RolloutError(f"the environment at {url} answered what is no observation: {reply[:200]!r}")
    return Step(observation, None if reward is None else float(reward), is_done)


def _object(reply: str) -> dict[str, Any]:
    try:
        body = json.loads(reply)
    except ValueError:
        return {}
    return body if isinstance(body, dict) else {}


def _described(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
