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

from weightline.chain import Chain, open_chain
from weightline.errors import InputError, WeightlineError
from weightline.format.signature import load_trusted_keys
from weightline.receiver.auth import TOKEN_VARIABLE, has_given_token, is_loopback, load_token
from weightline.receiver.door import build_door
from weightline.receiver.engines.base import Engine
from weightline.receiver.engines.transformers import TransformersEngine
from weightline.receiver.following import SERVING_REF, Following
from weightline.receiver.registration import Presence
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
    follow_ref: str | None = None
    """Follow only what this ref stands for; None: every version."""
    device: str | None = None
    drain_seconds: float = 60.0
    lease_seconds: float = 30.0
    advertise_url: str | None = None
    """Where others reach the replica, when that is not where it listens."""
    trusted_keys: Path | None = None
    """Public keys, one of which must have signed every version. None: what the environment demands."""

    @property
    def following(self) -> Following | None:
        return None if self.follow_seconds is None else Following(self.follow_seconds, self.follow_ref)

    def open_chain(self) -> Chain:
        """The chain, believed as far as the trusted keys vouch for it. InputError for a key file that is none."""
        trusted = None if self.trusted_keys is None else load_trusted_keys(self.trusted_keys)
        return open_chain(self.chain_url, trusted)

    def presence(self, port: int) -> Presence:
        """What the lease says. A replica that listens on all interfaces does not know its own address."""
        is_anywhere = self.host in ("", "0.0.0.0", "::")  # noqa: S104 - compared, not bound
        url = self.advertise_url or (None if is_anywhere else _url_of(self.host, port))
        return Presence(url, self.following.what if self.following else None, self.lease_seconds)


def serve(settings: ServerSettings, engine: Engine | None = None) -> None:
    """Serve until told to stop; by the embedded engine unless another one is given.

    InputError, before anything is loaded, when the port is taken, the state folder or the name is another replica's,
    or the door would be open to others without a token that somebody chose.
    """
    require_safe_binding(settings.host, settings.state_dir)
    with own_folder(settings.state_dir), _listening(settings) as listener:
        replica = Replica(
            settings.open_chain(),
            engine or TransformersEngine(settings.device),
            settings.state_dir,
            settings.name,
            ReplicaSettings(drain_seconds=settings.drain_seconds),
        )
        service = ReplicaService(replica, settings.following, settings.presence(listener.getsockname()[1]))
        app = build_door(service, load_token(settings.state_dir))
        service.start()
        try:
            config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5)
            uvicorn.Server(config).run(sockets=[listener])
        finally:
            service.close()


def require_safe_binding(host: str, state_dir: Path) -> None:
    """InputError for an address that others can reach, unless somebody chose a token."""
    if not is_loopback(host) and not has_given_token(state_dir):
        raise InputError(
            f"{host} can be reached from elsewhere: choose the token that opens it ({TOKEN_VARIABLE}, or the file "
            f"{state_dir / 'token'}, mode 0600), or listen on 127.0.0.1",
            field="host",
        )


@contextmanager
def own_folder(state_dir: Path) -> Iterator[None]:
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
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
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
        write_address(settings, listener.getsockname()[1])
        try:
            yield listener
        finally:
            path.unlink(missing_ok=True)


def write_address(settings: ServerSettings, port: int) -> None:
    """Tell, in one rename, where the replica of this state folder listens."""
    path = settings.state_dir / ADDRESS_FILE
    address = {
        "url": _url_of(settings.host, port),
        "host": settings.host,
        "port": port,
        "pid": os.getpid(),
        "replica": settings.name,
        "chain": settings.chain_url,
    }
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(json.dumps(address, indent=1))
    temporary.replace(path)


def _url_of(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def build_parser() -> argparse.ArgumentParser:
    """The options of the command line."""
    parser = argparse.ArgumentParser(prog="python -m weightline.receiver.server", description=__doc__)
    add = parser.add_argument
    add("--chain", required=True, help="URL of the chain's bucket prefix")
    add("--state-dir", required=True, type=Path, help="folder for the mark, the token and address.json")
    add("--name", default="replica-0", help="name of this replica in leases and records")
    add("--host", default="127.0.0.1", help="another than a loopback address needs a token that you chose")
    add("--port", default=8000, type=int, help="0 takes a free one")
    add("--advertise", metavar="URL", help="where others reach this replica, when that is not where it listens")
    add("--follow", metavar="SECONDS", type=float, nargs="?", const=5.0, help="look for new versions that often (5)")
    add(
        "--follow-ref", metavar="NAME", nargs="?", const=SERVING_REF,
        help=f"follow only what this ref stands for ({SERVING_REF}: the versions that passed their gate)",
    )  # fmt: skip
    add("--lease", metavar="SECONDS", type=float, default=30.0, help="how long others take this replica for alive")
    add("--require-signature", metavar="KEYFILE", type=Path, help="serve only versions that one of these keys signed")
    add("--device", help="torch device; cuda where there is one, else cpu")
    add("--drain", metavar="SECONDS", type=float, default=60.0, help="longest wait for requests under way")
    return parser


def settings_of(given: argparse.Namespace) -> ServerSettings:
    """The options as settings. A ref to follow means following."""
    return ServerSettings(
        chain_url=given.chain,
        state_dir=given.state_dir,
        name=given.name,
        host=given.host,
        port=given.port,
        follow_seconds=5.0 if given.follow is None and given.follow_ref is not None else given.follow,
        follow_ref=given.follow_ref,
        device=given.device,
        drain_seconds=given.drain,
        lease_seconds=given.lease,
        advertise_url=given.advertise,
        trusted_keys=given.require_signature,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    settings = settings_of(build_parser().parse_args(argv))
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
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
