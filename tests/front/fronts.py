"""A front behind a real socket, in a thread of the test's own process."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from tests.waiting import wait_until
from weightline.front.app import build_app
from weightline.front.settings import FrontSettings
from weightline.serving.http.protocol import server_config
from weightline.serving.http.server import ServerSettings, listening


@contextmanager
def running_front(chain_url: str, state_dir: Path, num_up: int, **settings: Any) -> Iterator[str]:
    """Yields the URL of a front that sends requests to `num_up` replicas."""
    state_dir.mkdir(parents=True, exist_ok=True)
    with listening(ServerSettings(chain_url, state_dir, "front", port=0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        app = build_app(FrontSettings(chain_url, state_dir, **settings))
        server = uvicorn.Server(server_config(app, graceful_seconds=5))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        try:
            wait_until(lambda: server.started)
            wait_until(lambda: len(up(url)), lambda num: num == num_up, told=lambda: status(url))
            yield url
        finally:
            server.should_exit = True
            thread.join(20)


def status(url: str) -> dict[str, Any]:
    """The status of the front."""
    found: dict[str, Any] = httpx.get(f"{url}/weightline/front", trust_env=False).json()
    return found


def up(url: str) -> dict[str, int]:
    """The versions of the replicas that get requests, by name."""
    return {row["replica"]: row["version"] for row in status(url)["replicas"] if row["is_up"]}
