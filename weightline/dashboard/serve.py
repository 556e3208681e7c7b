"""Running the app under uvicorn."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Sequence

import uvicorn

from weightline.dashboard.app import make_app
from weightline.dashboard.board import Board
from weightline.errors import InputError

_LOOPBACK = ("127.0.0.1", "localhost", "[::1]")


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there, before anybody is told the address. InputError when it is taken, or no address."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        message = f"port: nothing can listen on {host}:{port}: {error.strerror}. Name another --port or --host"
        raise InputError(message, field="port", host=host, port=port) from error


def serve(urls: Sequence[str], listener: socket.socket, *, host: str, prefect_ui: str | None = None) -> None:
    """Serve until interrupted. InputError for a URL that no store has. Writes nothing; safe to repeat.

    `host`: what the listener was opened for, which says the names that are answered to.
    """
    board = Board(urls)
    app = make_app(board, prefect_ui=prefect_ui, hosts=allowed_hosts(host))
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2)
    BoardServer(config, board).run(sockets=[listener])


class BoardServer(uvicorn.Server):
    """A server that ends its event streams before it waits for open connections."""

    def __init__(self, config: uvicorn.Config, board: Board) -> None:
        super().__init__(config)
        self._board = board

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._board.end_streams()
        await super().shutdown(sockets)


def allowed_hosts(host: str) -> tuple[str, ...]:
    """On a loopback address only its own names: a page elsewhere cannot reach it through a name of its own."""
    if host == "localhost" or _is_loopback(host):
        return (*_LOOPBACK, host)
    return ("*",)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
