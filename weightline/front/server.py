"""Serves one front on one socket, in the foreground until a signal, for `weightline serve front`."""

from __future__ import annotations

import logging

import uvicorn

from weightline.chain.read.discovery import warn_if_empty
from weightline.front.app import build_app
from weightline.front.settings import FrontSettings
from weightline.serving.http.hosts import trusted_patterns
from weightline.serving.http.protocol import server_config
from weightline.serving.http.server import ServerSettings, listening, own_folder

_log = logging.getLogger(__name__)
_GRACEFUL_SECONDS = 30


def serve(settings: FrontSettings) -> None:
    """Forwards requests until a signal ends it. Requests under way have 30 s to end.

    InputError when the port or the state folder is in use, or WEIGHTLINE_REPLICA_HOSTS has a pattern that is none.
    """
    trusted_patterns()
    address = ServerSettings(settings.chain_url, settings.state_dir, settings.name, settings.host, settings.port)
    with own_folder(settings.state_dir), listening(address) as listener:
        warn_if_empty(settings.open_chain())
        app = build_app(settings)
        _log.info("front %s of %s listens on port %s", settings.name, settings.chain_url, listener.getsockname()[1])
        uvicorn.Server(server_config(app, graceful_seconds=_GRACEFUL_SECONDS)).run(sockets=[listener])
