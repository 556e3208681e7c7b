"""What the tests' HTTP servers share: quiet handlers on 127.0.0.1 that can hang up in mid-reply."""

from __future__ import annotations

import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class QuietHandler(BaseHTTPRequestHandler):
    """Keeps connections open, logs nothing."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # without it every small reply costs 40 ms

    def log_message(self, *_: object) -> None:
        pass

    def cut(self) -> None:
        """Hang up on the client."""
        self.close_connection = True
        try:
            self.connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # the client hung up first


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients hang up on replies that they do not need; anything else is a defect worth seeing."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


@contextmanager
def listening(handler: type[QuietHandler], port: int = 0, *, host: str = "127.0.0.1", **bound: object) -> Iterator[int]:
    """The port of a server for the length of a block. Handlers see what is `bound` as attributes."""
    server = _Server((host, port), type("_BoundHandler", (handler,), bound))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
