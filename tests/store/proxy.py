"""A misbehaving network between an S3 client and its server: an HTTP proxy on 127.0.0.1 with knobs."""

from __future__ import annotations

import http.client
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit

from tests.http_server import QuietHandler, listening
from tests.hub_emulator.faults import Cut, Fault, FaultPlan, LoseReply, Status, Truncate


@dataclass(frozen=True, slots=True)
class FlipBit:
    """One bit of the reply's body arrives wrong."""


@dataclass(slots=True)
class Proxy:
    """Set the knobs at any time; `plan(number, method, path)` decides about each request, counted from 0."""

    server_port: int
    port: int = 0
    plan: FaultPlan | None = None
    flip: re.Pattern[str] | None = None
    """GET replies for paths that match arrive with a flipped bit."""
    dropped_headers: frozenset[str] = frozenset()
    """Request headers (lower case) that never arrive."""
    translated_headers: dict[tuple[str, str], tuple[str, str]] = field(default_factory=dict)
    """Request headers (lower case name, value) that arrive as others: another service's dialect."""
    added_reply_headers: dict[str, str] = field(default_factory=dict)
    list_lag_seconds: float = 0.0
    """Listings do not show objects that were put through here more recently."""
    requests: list[tuple[str, str]] = field(default_factory=list)
    put_at: dict[str, float] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def admit(self, method: str, path: str) -> Fault | FlipBit | None:
        with self.lock:
            number = len(self.requests)
            self.requests.append((method, path))
            if method in ("PUT", "POST"):
                self.put_at.setdefault(unquote(urlsplit(path).path), time.monotonic())
            fault = self.plan(number, method, path) if self.plan else None
        if fault is None and method == "GET" and self.flip and self.flip.search(path):
            return FlipBit()
        return fault

    def reset(self) -> None:
        """No faults; requests are counted from 0 again."""
        with self.lock:
            self.plan = self.flip = None
            self.requests.clear()


class _Handler(QuietHandler):
    proxy: Proxy

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.proxy.admit(self.command, self.path)
        if isinstance(fault, Cut):
            return self.cut()
        if isinstance(fault, Status):
            return self._send(fault.code, [], b"<Error><Code>SlowDown</Code><Message>planned</Message></Error>")
        status, headers, reply = self._forward(body)
        if isinstance(fault, LoseReply):
            return self.cut()
        if isinstance(fault, FlipBit) and reply:
            reply = reply[: len(reply) // 2] + bytes([reply[len(reply) // 2] ^ 4]) + reply[len(reply) // 2 + 1 :]
        if self.proxy.list_lag_seconds and "list-type=2" in self.path:
            reply = self._lagging(reply)
        return self._send(status, headers, reply, is_truncated=isinstance(fault, Truncate))

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _handle

    def _forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.proxy.server_port, timeout=60)
        translated = self.proxy.translated_headers
        pairs = [translated.get((k.lower(), v), (k, v)) for k, v in self.headers.items()]
        headers = {k: v for k, v in pairs if k.lower() not in self.proxy.dropped_headers}
        connection.request(self.command, self.path, body, headers)
        reply = connection.getresponse()
        content = reply.read()
        connection.close()
        kept = [(k, v) for k, v in reply.getheaders() if k.lower() not in ("transfer-encoding", "connection")]
        return reply.status, [*kept, *self.proxy.added_reply_headers.items()], content

    def _lagging(self, listing: bytes) -> bytes:
        bucket = urlsplit(self.path).path.strip("/")
        horizon = time.monotonic() - self.proxy.list_lag_seconds

        def shown(match: re.Match[str]) -> str:
            return "" if self.proxy.put_at.get(f"/{bucket}/{match[1]}", 0.0) > horizon else match[0]

        return re.sub(
            r"<Contents>(?:(?!</Contents>).)*?<Key>(.*?)</Key>.*?</Contents>", shown, listing.decode(), flags=re.DOTALL
        ).encode()

    def _send(self, status: int, headers: list[tuple[str, str]], body: bytes, *, is_truncated: bool = False) -> None:
        self.send_response_only(status)
        has_length = self.command == "HEAD"
        for name, value in headers:
            if name.lower() != "content-length" or has_length:
                self.send_header(name, value)
        if not has_length:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if is_truncated else body)
        if is_truncated:
            self.cut()


@contextmanager
def running_proxy(server_port: int) -> Iterator[Proxy]:
    """A proxy before the server at that port, for the length of a block."""
    proxy = Proxy(server_port)
    with listening(_Handler, proxy=proxy) as proxy.port:
        yield proxy
