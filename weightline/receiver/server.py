"""`python -m weightline.receiver.server`: one replica behind one door, in the foreground until SIGTERM or Ctrl-C."""

from __future__ import annotations

import argparse
import fcntl
import json
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import uvicorn

from weightline.chain import open_chain
from weightline.errors import InputError, WeightlineError
from weightline.receiver.auth import load_token
from weightline.receiver.door import build_door
from weightline.receiver.engines.transformers import TransformersEngine
from weightline.receiver.replica import Replica, ReplicaSettings
from weightline.receiver.service import ReplicaService

ADDRESS_FILE = "address.json"


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """`port` 0 takes a free one, told by `address.json` in the state folder. `follow_seconds` None: move when told."""

    chain_url: str
    state_dir: Path
    name: str = "replica-0"
    host: str = "127.0.0.1"
    port: int = 8000
    follow_seconds: float | None = None
    device: str | None = None
    drain_seconds: float = 60.0


def serve(settings: ServerSettings) -> None:
    """Serve until told to stop. InputError when the port is taken or the state folder is another replica's."""
    with _own_folder(settings.state_dir), _listening(settings) as listener:
        replica = Replica(
            open_chain(settings.chain_url),
            TransformersEngine(settings.device),
            settings.state_dir,
            settings.name,
            ReplicaSettings(drain_seconds=settings.drain_seconds),
        )
        service = ReplicaService(replica, settings.follow_seconds)
        app = build_door(service, load_token(settings.state_dir))
        service.start()
        try:
            config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5)
            uvicorn.Server(config).run(sockets=[listener])
        finally:
            service.close()


@contextmanager
def _own_folder(state_dir: Path) -> Iterator[None]:
    """One process per state folder. The lock goes with the process, however it ends."""
    state_dir.mkdir(parents=True, exist_ok=True)
    with (state_dir / "lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"{state_dir} is in use by another replica: name another folder") from error
        yield


@contextmanager
def _listening(settings: ServerSettings) -> Iterator[socket.socket]:
    """A socket that accepts connections from now on, and the file that tells where."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((settings.host, settings.port))
        except OSError as error:
            raise InputError(
                f"port {settings.port} of {settings.host} cannot be taken: {error.strerror}. Name another or 0",
                port=settings.port,
            ) from error
        listener.listen(128)
        path = settings.state_dir / ADDRESS_FILE
        _write_address(path, settings, listener.getsockname()[1])
        try:
            yield listener
        finally:
            path.unlink(missing_ok=True)


def _write_address(path: Path, settings: ServerSettings, port: int) -> None:
    address = {
        "url": f"http://{settings.host}:{port}",
        "host": settings.host,
        "port": port,
        "pid": os.getpid(),
        "replica": settings.name,
        "chain": settings.chain_url,
    }
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(json.dumps(address, indent=1))
    temporary.replace(path)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m weightline.receiver.server", description=__doc__)
    parser.add_argument("--chain", required=True, help="URL of the chain's bucket prefix")
    parser.add_argument("--state-dir", required=True, type=Path, help="folder for the mark, the token and address.json")
    parser.add_argument("--name", default="replica-0", help="name of this replica in records")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", default=8000, type=int, help="0 takes a free one")
    parser.add_argument("--follow", metavar="SECONDS", type=float, help="look for new versions that often")
    parser.add_argument("--device", help="torch device; cuda where there is one, else cpu")
    parser.add_argument(
        "--drain", metavar="SECONDS", type=float, default=60.0, help="longest wait for requests under way"
    )
    given = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    settings = ServerSettings(
        given.chain, given.state_dir, given.name, given.host, given.port, given.follow, given.device, given.drain
    )
    # uvicorn raises the signal that ended it again: leave by way of the `finally`s.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    signal.signal(signal.SIGINT, lambda *_: sys.exit(0))
    try:
        serve(settings)
    except WeightlineError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
