"""A misbehaving network between an S3 client and its server: an HTTP proxy on 127.0.0.1 with knobs."""

from __future__ import annotations

import http.client
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit

from tests.http_server import QuietHandler, listening
from tests.hub_emulator.faults import Cut, Fault, LoseReply, Status, Truncate


@dataclass(frozen=True, slots=True)
class FlipBit:
    """One bit of the reply's body arrives wrong."""


@dataclass(frozen=True, slots=True)
class Slow:
    """A request's body arrives, or a reply's body leaves, over so many seconds."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Stall:
    """After half of the reply nothing more comes, until the connection is cut after so many seconds."""

    seconds: float


ProxyFault = Fault | FlipBit | Slow | Stall


@dataclass(slots=True)
class Proxy:
    """Set the knobs at any time; `plan(number, method, path)` decides about each request, counted from 0."""

    server_port: int
    port: int = 0
    plan: Callable[[int, str, str], ProxyFault | None] | None = None
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
    num_open: Counter[str] = field(default_factory=Counter)
    most_open: Counter[str] = field(default_factory=Counter)
    """Requests that are being answered, by method, and the most there were at once."""
    put_at: dict[str, float] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def admit(self, method: str, path: str) -> ProxyFault | None:
        with self.lock:
            number = len(self.requests)
            self.requests.append((method, path))
            if method in ("PUT", "POST"):
                self.put_at.setdefault(unquote(urlsplit(path).path), time.monotonic())
            fault = self.plan(number, method, path) if self.plan else None
        if fault is None and method == "GET" and self.flip and self.flip.search(path):
            return FlipBit()
        return fault

    @contextmanager
    def counted(self, method: str) -> Iterator[None]:
        with self.lock:
            self.num_open[method] += 1
            self.most_open[method] = max(self.most_open[method], self.num_open[method])
        try:
            yield
        finally:
            with self.lock:
                self.num_open[method] -= 1

    def reset(self) -> None:
        """No faults; requests are counted from 0 again."""
        with self.lock:
            self.plan = self.flip = None
            self.requests.clear()


class _Handler(QuietHandler):
    proxy: Proxy

    def _handle(self) -> None:
        with self.proxy.counted(self.command):
            self._answer()

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.proxy.admit(self.command, self.path)
        if isinstance(fault, Cut):
            return self.cut()
        if isinstance(fault, Status):
            said = f"<Error><Code>{fault.name}</Code><Message>planned</Message></Error>"
            return self._send(fault.code, [], said.encode())
        if isinstance(fault, Slow) and body:
            time.sleep(fault.seconds)
        status, headers, reply = self._forward(body)
        if isinstance(fault, LoseReply):
            return self.cut()
        if isinstance(fault, FlipBit) and reply:
            reply = reply[: len(reply) // 2] + bytes([reply[len(reply) // 2] ^ 4]) + reply[len(reply) // 2 + 1 :]
        if self.proxy.list_lag_seconds and "list-type=2" in self.path:
            reply = self._lagging(reply)
        return self._send(status, headers, reply, fault)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _handle

    def _forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        translated = self.proxy.translated_headers
        pairs = [translated.get((k.lower(), v), (k, v)) for k, v in self.headers.items()]
        headers = {k: v for k, v in pairs if k.lower() not in self.proxy.dropped_headers}
        # The server may hang up, in which case the client behind this proxy is hung up on, too.
        with closing(http.client.HTTPConnection("127.0.0.1", self.proxy.server_port, timeout=60)) as connection:
            connection.request(self.command, self.path, body, headers)
            reply = connection.getresponse()
            content = reply.read()
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

    def _send(self, status: int, headers: list[tuple[str, str]], body: bytes, fault: ProxyFault | None = None) -> None:
        self.send_response_only(status)
        has_length = self.command == "HEAD"
        for name, value in headers:
            if name.lower() != "content-length" or has_length:
                self.send_header(name, value)
        if not has_length:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if isinstance(fault, Slow):
            self._trickle(body, fault.seconds)
        elif isinstance(fault, Truncate | Stall):
            self.wfile.write(body[: len(body) // 2])
            time.sleep(fault.seconds if isinstance(fault, Stall) else 0)
            self.cut()
        else:
            self.wfile.write(body)

    def _trickle(self, body: bytes, seconds: float) -> None:
        step = -(-len(body) // 10) or 1
        for at in range(0, len(body), step):
            self.wfile.write(body[at : at + step])
            time.sleep(seconds / 10)


@contextmanager
def running_proxy(server_port: int) -> Iterator[Proxy]:
    """A proxy before the server at that port, for the length of a block."""
    proxy = Proxy(server_port)
    with listening(_Handler, proxy=proxy) as proxy.port:
        yield proxy
