"""A dashboard served for real, and a real browser to look at it with."""

from __future__ import annotations

import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.dashboard.chains import broken_chain, demo_chains
from tests.waiting import PATIENCE_SECONDS
from weightline.chain import Chain
from weightline.dashboard.app import make_app
from weightline.dashboard.board import Board
from weightline.dashboard.serve import BoardServer
from weightline.serving.http.protocol import server_config

#: Set to write docs/images anew from these tests.
PICTURES_VARIABLE = "WEIGHTLINE_WRITE_PICTURES"
PICTURES = Path(__file__).resolve().parents[2] / "docs" / "images"
_BROWSERS = ("chromium", "chromium-browser", "google-chrome")
_ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]

Open = Callable[..., Page]
Serve = Callable[..., str]


@contextmanager
def served(urls: Sequence[str], *, prefect_ui: str | None = None, poll_seconds: float = 0.2) -> Iterator[str]:
    """URL of a dashboard of these buckets, in this process."""
    board = Board(urls, poll_seconds)
    app = make_app(board, prefect_ui=prefect_ui, hosts=("127.0.0.1",))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = BoardServer(server_config(app, graceful_seconds=2), board)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            while not server.started:
                assert thread.is_alive()
                time.sleep(0.01)
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Debian's Chromium. `make test` installs it where apt can."""
    found = next((path for name in _BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    expect.set_options(timeout=1000 * PATIENCE_SECONDS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=_ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Starts dashboards that end with the test."""
    with ExitStack() as stack:
        yield lambda *urls, **options: stack.enter_context(served(urls, **options))


@pytest.fixture
def open_page(browser: Browser, serve: Serve) -> Iterator[Open]:
    """Opens a page and fails the test for whatever the browser complains of, blocked scripts included.

    Asks for `serve` so that pages close before their server does.
    """
    complaints: list[str] = []
    contexts = []

    def opened(url: str, *, width: int = 1440, height: int = 1000, scheme: str = "light") -> Page:
        context = browser.new_context(
            viewport={"width": width, "height": height},
            color_scheme=scheme,  # type: ignore[arg-type]
            locale="en-GB",
        )
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(url)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert complaints == []


@pytest.fixture(scope="session")
def demo() -> tuple[Chain, Chain]:
    """The chain of chains.demo_chains and its fork. Only looked at."""
    return demo_chains("memory://bucket")


@pytest.fixture
def broken(tmp_path: Path) -> Chain:
    """See chains.broken_chain."""
    return broken_chain(tmp_path / "broken")


@pytest.fixture(scope="session")
def demo_url(demo: tuple[Chain, Chain]) -> Iterator[str]:
    """A dashboard of the demo chains."""
    with served([chain.url for chain in demo], prefect_ui="http://127.0.0.1:4200") as url:
        yield url


@pytest.fixture
def picture() -> Callable[[Page, str], None]:
    """Keeps a picture for the docs when asked to."""

    def take(page: Page, name: str) -> None:
        if os.environ.get(PICTURES_VARIABLE):
            page.screenshot(path=PICTURES / f"{name}.png")

    return take
