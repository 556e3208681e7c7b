"""What a client can take from a server that weightline starts: bytes, time, connections and lines of the log."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import uvicorn
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send

from tests.waiting import PATIENCE_SECONDS, wait_until
from weightline.serving.http.app import _MAX_BODY_NBYTES
from weightline.serving.http.bounds import BodyReader, BoundedApp, RefusalLog
from weightline.serving.http.protocol import BoundedProtocol, connection_limit, server_config

LIMIT = 1000
AUTHORIZED = b"authorization: Bearer yes\r\n"


async def _told(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers with the number of bytes that arrived, or with 50 MB at /large. /hold answers nothing."""
    if scope["path"] == "/large":
        await PlainTextResponse(b"x" * 50_000_000)(scope, receive, send)
        return
    body = await Request(scope, receive).body()
    if scope["path"] == "/hold":
        while (await receive())["type"] != "http.disconnect":
            pass
        return
    await PlainTextResponse(f"got {len(body)}")(scope, receive, send)


def _lacks_token(scope: Scope) -> bool:
    return scope["path"] == "/guarded" and (b"authorization", b"Bearer yes") not in scope["headers"]


@contextmanager
def _served(reader: BodyReader | None = None, limit_concurrency: int | None = None, **bounds: float) -> Iterator[Any]:
    """Yields (address, server) of a bounded app in a thread of this process."""
    sizes = {("POST", "/guarded"): LIMIT, ("POST", "/open"): LIMIT}
    app = BoundedApp(_told, max_body_nbytes=sizes, is_refused=_lacks_token, reader=reader)
    config = server_config(app, graceful_seconds=1)
    config.http = type("Bounded", (BoundedProtocol,), bounds)
    config.limit_concurrency = limit_concurrency or config.limit_concurrency
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        try:
            wait_until(lambda: server.started)
            yield listener.getsockname(), server
        finally:
            server.should_exit = True
            thread.join(PATIENCE_SECONDS)


def _opened(address: tuple[str, int], data: bytes) -> socket.socket:
    connection = socket.create_connection(address, timeout=PATIENCE_SECONDS)
    connection.sendall(data)
    return connection


def _asked(address: tuple[str, int], data: bytes) -> bytes:
    """Everything that the server sends until it closes the connection."""
    with _opened(address, data) as connection:
        return _rest(connection)


def _rest(connection: socket.socket) -> bytes:
    answer = b""
    try:
        while chunk := connection.recv(65536):
            answer += chunk
    except ConnectionResetError:
        pass
    return answer


def _head(route: bytes, *headers: bytes, method: bytes = b"POST") -> bytes:
    return method + b" " + route + b" HTTP/1.1\r\nhost: x\r\n" + b"".join(headers) + b"\r\n"


@pytest.fixture(scope="module")
def address() -> Iterator[tuple[str, int]]:
    with _served() as (address, _):
        yield address


CLOSE = b"connection: close\r\n"


@pytest.mark.parametrize("length", [b"content-length: 400000000\r\n", b"transfer-encoding: chunked\r\n"])
def test_the_token_is_checked_before_a_byte_of_the_body_is_read(address: tuple[str, int], length: bytes) -> None:
    """The client sends no body: an answer shows that the server did not wait for one."""
    answer = _asked(address, _head(b"/guarded", length))
    assert answer.startswith(b"HTTP/1.1 401")
    assert b"www-authenticate: Bearer" in answer


def test_a_body_within_the_limit_arrives_whole(address: tuple[str, int]) -> None:
    length = b"content-length: %d\r\n" % LIMIT
    assert _asked(address, _head(b"/guarded", AUTHORIZED, CLOSE, length) + b"x" * LIMIT).endswith(b"got 1000")
    chunked = b"transfer-encoding: chunked\r\n"
    body = b"3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n"
    assert _asked(address, _head(b"/open", CLOSE, chunked) + body).endswith(b"got 5")


def test_a_body_that_is_too_large_is_refused_by_its_head_or_once_it_is(address: tuple[str, int]) -> None:
    for digits in (b"1001", b"9" * 30):
        answer = _asked(address, _head(b"/open", b"content-length: " + digits + b"\r\n"))
        assert answer.startswith((b"HTTP/1.1 413", b"HTTP/1.1 400"))
    chunks = b"1f4\r\n" + b"x" * 500 + b"\r\n"
    answer = _asked(address, _head(b"/open", b"transfer-encoding: chunked\r\n") + 3 * chunks)
    assert answer.startswith(b"HTTP/1.1 413")


def test_a_route_that_takes_no_body_does_not_read_one(address: tuple[str, int]) -> None:
    answer = _asked(address, _head(b"/health", b"content-length: 400000000\r\n", method=b"GET"))
    assert answer.startswith(b"HTTP/1.1 200")
    assert answer.endswith(b"got 0")


def test_two_statements_of_the_length_are_refused_and_the_rest_is_no_request(address: tuple[str, int]) -> None:
    lengths = b"content-length: 4\r\ntransfer-encoding: chunked\r\n"
    answer = _asked(address, _head(b"/open", lengths) + b"0\r\n\r\n" + _head(b"/health", method=b"GET"))
    assert answer.count(b"HTTP/1.1 ") == 1
    assert answer.startswith(b"HTTP/1.1 400")


@pytest.mark.parametrize("headers", [b"a: b\r\n" * 101, b"a: " + b"b" * 40_000 + b"\r\n", b"a: b\r\n" * 20_000])
def test_headers_are_bounded(address: tuple[str, int], headers: bytes) -> None:
    assert _asked(address, _head(b"/open", CLOSE, headers)).startswith((b"HTTP/1.1 431", b"HTTP/1.1 400"))


def test_all_bodies_together_are_bounded() -> None:
    with _served(BodyReader(max_held_nbytes=LIMIT)) as (address, _):
        length = b"content-length: 900\r\n"
        with _opened(address, _head(b"/open", length) + b"x" * 800) as waiting:
            wait_until(
                lambda: _asked(address, _head(b"/open", CLOSE, length) + b"x" * 900)[9:12], lambda s: s == b"503"
            )
            waiting.sendall(b"x" * 100)
            assert waiting.recv(65536).startswith(b"HTTP/1.1 200")
        wait_until(lambda: _asked(address, _head(b"/open", CLOSE, length) + b"x" * 900)[9:12], lambda s: s == b"200")


def test_a_body_that_does_not_arrive_is_given_up() -> None:
    with _served(BodyReader(max_seconds=0.05)) as (address, _):
        assert _asked(address, _head(b"/open", b"content-length: 9\r\n") + b"x").startswith(b"HTTP/1.1 408")


@pytest.mark.parametrize(
    "sent", [b"", b"POST /open HTTP/1.1\r\nhost: x\r\nx: ", _head(b"/h", method=b"GET") + b"GET /"]
)
def test_a_request_that_does_not_arrive_is_cut(sent: bytes) -> None:
    """Also the second one of a connection, which stops uvicorn's own clock by its first byte."""
    with _served(max_head_seconds=0.1) as (address, server):
        with _opened(address, sent) as connection:
            _rest(connection)
        wait_until(lambda: not server.server_state.connections)


def test_a_trickle_after_the_answer_is_cut() -> None:
    with _served(max_head_seconds=0.1) as (address, server):
        with _opened(address, _head(b"/h", b"content-length: 9\r\n", method=b"GET") + b"x") as connection:
            assert _rest(connection).startswith(b"HTTP/1.1 200")
        wait_until(lambda: not server.server_state.connections)


def test_a_refusal_is_read_by_a_client_that_is_still_sending(address: tuple[str, int]) -> None:
    """A connection closed at once would be reset by the bytes that come after the answer."""
    with _opened(address, _head(b"/guarded", b"content-length: 400000000\r\n")) as connection:
        assert connection.recv(1, socket.MSG_PEEK)
        for _ in range(3):
            connection.sendall(b"x" * 300_000)
        assert connection.recv(65536).startswith(b"HTTP/1.1 401")
        connection.sendall(b"x")
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(65536):
            pass


@pytest.mark.parametrize(("max_linger_seconds", "num_bytes"), [(0.1, 1), (3600.0, 5_000_000)])
def test_a_client_that_sends_on_after_its_refusal_is_cut(max_linger_seconds: float, num_bytes: int) -> None:
    """After a time if it sends slowly, and after some bytes if it sends fast."""
    with _served(max_linger_seconds=max_linger_seconds) as (address, server):
        with _opened(address, _head(b"/guarded", b"content-length: 400000000\r\n")) as connection:

            def is_cut() -> bool:
                try:
                    connection.sendall(b"x" * num_bytes)
                except ConnectionError:
                    return True
                return False

            wait_until(is_cut)
        wait_until(lambda: not server.server_state.connections)


def test_an_answer_that_is_not_read_is_cut() -> None:
    with _served(max_unread_seconds=0.1) as (address, server):
        with _opened(address, _head(b"/large", method=b"GET")):
            wait_until(lambda: server.server_state.connections)
            wait_until(lambda: not server.server_state.connections)


def test_half_sent_requests_take_no_place_from_whole_ones() -> None:
    with _served(limit_concurrency=9) as (address, server):
        half = [_opened(address, b"POST /open HTTP/1.1\r\nx: ") for _ in range(30)]
        half += [_opened(address, _head(b"/open", b"content-length: 9\r\n") + b"x") for _ in range(30)]
        for _ in range(20):
            assert _asked(address, _head(b"/health", CLOSE, method=b"GET")).startswith(b"HTTP/1.1 200")
        wait_until(lambda: len(server.server_state.connections) <= 9)
        for connection in half:
            connection.close()


def test_whole_requests_keep_their_place_and_a_new_one_is_refused() -> None:
    with _served(limit_concurrency=2) as (address, server):
        held = [_opened(address, _head(b"/hold", method=b"GET")) for _ in range(2)]
        wait_until(
            lambda: [one.is_sending for one in server.server_state.connections], lambda said: said == [False] * 2
        )
        answer = _asked(address, _head(b"/health", CLOSE, method=b"GET"))
        assert answer.startswith(b"HTTP/1.1 503")
        assert b"retry-after: 1" in answer
        held.pop().close()
        wait_until(lambda: _asked(address, _head(b"/h", CLOSE, method=b"GET")).startswith(b"HTTP/1.1 200"))
        held.pop().close()


def test_connections_leave_room_for_files(monkeypatch: pytest.MonkeyPatch) -> None:
    for num_files, expected in ((256, 96), (1024, 480), (10**6, 512), (-1, 512), (20, 8)):
        monkeypatch.setattr("resource.getrlimit", lambda _, num_files=num_files: (num_files, num_files))
        assert connection_limit() == expected


def test_a_flood_of_refusals_is_a_few_lines(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "weightline")
    log = RefusalLog(max_lines=3, window_seconds=3600.0)
    for _ in range(1000):
        log("GET /a\nb", "status 404")
    assert [record.message for record in caplog.records] == ['refused "GET /a\\nb": status 404'] * 3
    log._began -= 3600.0
    log("GET /c", "status 404")
    assert caplog.records[3].message == "refused 997 more requests"


def test_every_route_of_a_replica_that_takes_a_body_has_a_limit() -> None:
    assert set(_MAX_BODY_NBYTES) == {
        ("POST", "/v1/completions"), ("POST", "/v1/chat/completions"), ("POST", "/weightline/refresh"),
        ("POST", "/weightline/rollouts"),
    }  # fmt: skip
