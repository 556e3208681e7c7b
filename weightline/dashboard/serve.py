"""Runs the app under uvicorn."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Sequence

import uvicorn

from weightline.dashboard.app import make_app
from weightline.dashboard.board import Board
from weightline.errors import InputError
from weightline.serving.http.protocol import server_config

_LOOPBACK = ("127.0.0.1", "localhost", "[::1]")


def listen(host: str, port: int) -> socket.socket:
    """Returns a listening socket, so that the address works when it is printed. InputError when it cannot be used."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        message = f"port: cannot listen on {host}:{port}: {error.strerror}. Name another --port or --host"
        raise InputError(message, field="port", host=host, port=port) from error


def serve(urls: Sequence[str], listener: socket.socket, *, host: str, prefect_ui: str | None = None) -> None:
    """Serves until interrupted. Writes nothing; safe to repeat. InputError for a URL that no store supports.

    `host`: the address of the listener, which determines the host names for which requests are answered.
    """
    board = Board(urls)
    app = make_app(board, prefect_ui=prefect_ui, hosts=allowed_hosts(host))
    BoardServer(server_config(app, graceful_seconds=2), board).run(sockets=[listener])


class BoardServer(uvicorn.Server):
    """A server that ends its event streams before it waits for open connections."""

    def __init__(self, config: uvicorn.Config, board: Board) -> None:
        super().__init__(config)
        self._board = board

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._board.end_streams()
        await super().shutdown(sockets)


def allowed_hosts(host: str) -> tuple[str, ...]:
    """Returns the host names for which requests are answered.

    On a loopback address these are loopback names only, so that a foreign web page cannot reach the server through a
    name that resolves to it (DNS rebinding).
    """
    if host == "localhost" or _is_loopback(host):
        return (*_LOOPBACK, host)
    return ("*",)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
