"""HTTP: requests in, responses out, faults between."""

from __future__ import annotations

import io
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import parse_qsl, unquote, urlsplit

from tests.http_server import QuietHandler, listening
from tests.hub_emulator import cas_routes, hub_routes, s3_routes
from tests.hub_emulator.emulator import HubEmulator
from tests.hub_emulator.faults import Cut, Late, LoseReply, Status, Truncate
from tests.hub_emulator.wire import Request, Response, error

_ROUTES = [
    (methods, re.compile(pattern), answer)
    for methods, pattern, answer in (*s3_routes.ROUTES, *hub_routes.ROUTES, *cas_routes.ROUTES)
]


class _Handler(QuietHandler):
    emulator: HubEmulator

    def _handle(self) -> None:
        request = self._request()
        fault = self.emulator.admit(request.method, self.path)
        if self.emulator.hold is not None:
            self.emulator.hold(request)
        if isinstance(fault, Status):
            return self._send(error(fault.code, "planned"))
        if isinstance(fault, Cut | Late):
            if isinstance(fault, Late):
                threading.Timer(fault.seconds, _answer, (self.emulator, request)).start()
            return self.cut()
        response = _answer(self.emulator, request)
        if isinstance(fault, LoseReply):
            return self.cut()
        return self._send(response, is_truncated=isinstance(fault, Truncate))

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _handle

    def _request(self) -> Request:
        parts = urlsplit(self.path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        return Request(self.command, parts.path, dict(parse_qsl(parts.query)), headers, self._body())

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = io.BytesIO()
        while nbytes := int(self.rfile.readline().split(b";")[0], 16):
            body.write(self.rfile.read(nbytes))
            self.rfile.readline()
        self.rfile.readline()
        return body.getvalue()

    def _send(self, response: Response, *, is_truncated: bool = False) -> None:
        self.send_response(response.status)
        for name, value in response.headers.items():
            self.send_header(name, value)
        if "Content-Length" not in response.headers:
            self.send_header("Content-Length", str(len(response.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(response.body[: len(response.body) // 2] if is_truncated else response.body)
        if is_truncated:
            self.cut()


def _answer(emulator: HubEmulator, request: Request) -> Response:
    for methods, pattern, answer in _ROUTES:
        found = pattern.fullmatch(request.path)
        if found and request.method in methods:
            handle: Callable[..., Response] = answer
            return handle(emulator, request, *(unquote(group) if group else "" for group in found.groups()))
    return error(404, f"no route for {request.method} {request.path}")


@contextmanager
def running_emulator(root: Path, *, port: int = 0, host: str = "127.0.0.1") -> Iterator[HubEmulator]:
    """A Hub at an address of this machine for the length of a block, served by threads of this process."""
    emulator = HubEmulator.at(root)
    with listening(_Handler, port, host=host, emulator=emulator) as taken:
        emulator.url = f"http://{host}:{taken}"
        yield emulator
