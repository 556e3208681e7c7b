"""Running the app under uvicorn."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Sequence

import uvicorn

from weightline.dashboard.app import make_app
from weightline.dashboard.board import Board

_LOOPBACK = ("127.0.0.1", "localhost", "[::1]")


def serve(urls: Sequence[str], *, host: str, port: int, prefect_ui: str | None = None) -> None:
    """Serve until interrupted. InputError for a URL that no store has. Writes nothing; safe to repeat."""
    board = Board(urls)
    app = make_app(board, prefect_ui=prefect_ui, hosts=allowed_hosts(host))
    config = uvicorn.Config(app, host=host, port=port, log_level="warning", timeout_graceful_shutdown=2)
    BoardServer(config, board).run()


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
