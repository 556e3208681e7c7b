"""Serves one replica on one socket, in the foreground until a signal, for `weightline serve transformers`."""

from __future__ import annotations

import json
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import uvicorn

from weightline.chain import Chain, open_chain
from weightline.chain.read.discovery import warn_if_empty
from weightline.errors import InputError
from weightline.files import exclusive_lock, write_atomically
from weightline.format.keys import checked_name
from weightline.format.signature import load_trusted_keys
from weightline.serving.http.app import build_app
from weightline.serving.http.auth import TOKEN_VARIABLE, has_given_token, is_loopback, load_token
from weightline.serving.http.protocol import server_config
from weightline.serving.http.service import ReplicaService
from weightline.serving.replica.following import Following
from weightline.serving.replica.registration import Presence
from weightline.serving.replica.replica import Replica, ReplicaSettings

_log = logging.getLogger(__name__)
ADDRESS_FILE = "address.json"


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """The settings of a replica's server.

    `port` 0 takes a free port; `address.json` in the state folder names it. With `follow_seconds` None the replica
    moves on request only.
    """

    chain_url: str
    state_dir: Path
    name: str = "replica-0"
    host: str = "127.0.0.1"
    port: int = 8000
    follow_seconds: float | None = None
    follow_ref: str | None = None
    """The ref to follow; None: follow the tip."""
    device: str | None = None
    drain_seconds: float = 60.0
    lease_seconds: float = 30.0
    advertise_url: str | None = None
    """The URL at which others reach the replica, if it differs from the address that it listens on."""
    trusted_keys: Path | None = None
    """File of public keys, one of which must have signed every version. None: the keys that the environment names."""

    def __post_init__(self) -> None:
        """Raises InputError, before anything is loaded, for a name, a time or a URL that no replica can have."""
        checked_name(self.name)
        if self.follow_ref is not None:
            checked_name(self.follow_ref)
        Presence(ttl_seconds=self.lease_seconds)
        ReplicaSettings(self.drain_seconds)
        _ = self.following
        if self.advertise_url is not None and not _is_http(self.advertise_url):
            raise InputError(
                f"{self.advertise_url!r} is no URL at which others reach a replica: name one as in http://host:8000",
                field="advertise",
            )

    @property
    def following(self) -> Following | None:
        return None if self.follow_seconds is None else Following(self.follow_seconds, self.follow_ref)

    def open_chain(self) -> Chain:
        """Opens the chain, with the trusted keys if there are any. InputError for a file that holds no keys."""
        trusted = None if self.trusted_keys is None else load_trusted_keys(self.trusted_keys)
        return open_chain(self.chain_url, trusted)

    def presence(self, port: int) -> Presence:
        """Returns the fixed part of the lease. It has no URL when the replica listens on all interfaces."""
        is_anywhere = self.host in ("", "0.0.0.0", "::")  # noqa: S104 - compared, not bound
        url = self.advertise_url or (None if is_anywhere else _url_of(self.host, port))
        return Presence(url, self.following.what if self.following else None, self.lease_seconds)


def _is_http(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def serve(settings: ServerSettings) -> None:
    """Serves by the embedded engine until a signal ends it.

    InputError, before anything is loaded, when the port, the state folder or the name is in use, or when other machines
    could reach the replica without a token that an operator chose.
    """
    require_safe_binding(settings.host, settings.state_dir)
    with own_folder(settings.state_dir), listening(settings) as listener:
        chain = settings.open_chain()
        warn_if_empty(chain)
        # This imports torch, which takes seconds, so it comes after the checks that the server can start.
        from weightline.serving.engines.transformers import TransformersEngine

        engine = TransformersEngine(settings.device)
        options = ReplicaSettings(drain_seconds=settings.drain_seconds)
        replica = Replica(chain, engine, settings.state_dir, settings.name, options)
        service = ReplicaService(replica, settings.following, settings.presence(listener.getsockname()[1]))
        app = build_app(service, load_token(settings.state_dir))
        service.start()
        try:
            _log.info(
                "replica %s of %s listens on %s",
                settings.name, settings.chain_url, _url_of(settings.host, listener.getsockname()[1]),
            )  # fmt: skip
            uvicorn.Server(server_config(app, graceful_seconds=5)).run(sockets=[listener])
        finally:
            _log.info("replica %s of %s ends", settings.name, settings.chain_url)
            service.close()


def require_safe_binding(host: str, state_dir: Path) -> None:
    """Raises InputError for an address that other machines can reach, unless an operator chose a token."""
    if not is_loopback(host) and not has_given_token(state_dir):
        raise InputError(
            f"other machines can reach {host}: choose a token for it ({TOKEN_VARIABLE}, or the file "
            f"{state_dir / 'token'}, mode 0600), or listen on 127.0.0.1",
            field="host",
        )


@contextmanager
def own_folder(state_dir: Path) -> Iterator[None]:
    """Locks the state folder for this process. InputError when another one has it. The lock ends with the process."""
    state_dir.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        try:
            held.enter_context(exclusive_lock(state_dir / "lock"))
        except BlockingIOError as error:
            raise InputError(f"{state_dir} is in use by another replica: name another folder") from error
        yield


@contextmanager
def listening(settings: ServerSettings) -> Iterator[socket.socket]:
    """Yields a socket that accepts connections, and keeps the file with its address while it does."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((settings.host, settings.port))
        except OSError as error:
            raise InputError(
                f"port {settings.port} of {settings.host} cannot be used: {error.strerror}. Name another port, or 0",
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
    """Writes the address of the replica to its state folder, by one rename."""
    path = settings.state_dir / ADDRESS_FILE
    address = {
        "url": _url_of(settings.host, port),
        "host": settings.host,
        "port": port,
        "pid": os.getpid(),
        "replica": settings.name,
        "chain": settings.chain_url,
    }
    write_atomically(path, json.dumps(address, indent=1), is_durable=False)


def _url_of(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
