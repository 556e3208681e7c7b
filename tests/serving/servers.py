"""Replicas behind real sockets, in threads of the test's own process: a start takes no seconds."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import uvicorn

from tests.waiting import wait_until
from weightline.chain import Chain
from weightline.serving.engines.transformers import TransformersEngine
from weightline.serving.http.app import build_app
from weightline.serving.http.protocol import server_config
from weightline.serving.http.server import ServerSettings, listening
from weightline.serving.http.service import ReplicaService
from weightline.serving.replica.following import Following
from weightline.serving.replica.registration import Presence
from weightline.serving.replica.replica import Replica

TOKEN = "s3cret-of-the-tests"


@dataclass(frozen=True)
class RunningReplica:
    """A replica that serves until its context ends."""

    name: str
    url: str
    replica: Replica
    service: ReplicaService


@contextmanager
def running_replica(
    chain: Chain,
    state_dir: Path,
    name: str,
    *,
    following: Following | None = None,
    ttl_seconds: float = 30.0,
    version: int | None = None,
    engine: TransformersEngine | None = None,
) -> Iterator[RunningReplica]:
    """A transformers replica with a lease, at `version` if one is given. Leaves in order."""
    state_dir.mkdir(parents=True, exist_ok=True)
    replica = Replica(chain, engine or TransformersEngine("cpu"), state_dir, name)
    if version is not None:
        replica.refresh(version)
    with listening(ServerSettings(chain.url, state_dir, name, port=0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        presence = Presence(url, following.what if following else None, ttl_seconds)
        service = ReplicaService(replica, following, presence)
        server = uvicorn.Server(server_config(build_app(service, TOKEN), graceful_seconds=5))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        service.start()
        thread.start()
        try:
            wait_until(lambda: server.started)
            yield RunningReplica(name, url, replica, service)
        finally:
            server.should_exit = True
            thread.join(20)
            service.close()
