"""moto's S3 server, with creations that are atomic, as S3's are: `python -m tests.store.atomic_moto PORT`.

moto looks for the object and writes it in two steps. Two writers that create one key at the same moment then both
succeed, which no bucket that weightline supports lets happen.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterable
from typing import Any

from moto.moto_server.threaded_moto_server import MotoRequestHandler
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import run_simple


class AtomicCreations:
    """A WSGI app that answers conditional writes one at a time."""

    def __init__(self, app: Any) -> None:
        self._app, self._creating = app, threading.Lock()

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        if "HTTP_IF_NONE_MATCH" not in environ or environ["REQUEST_METHOD"] not in ("PUT", "POST"):
            answer: Iterable[bytes] = self._app(environ, start_response)
            return answer
        with self._creating:
            return list(self._app(environ, start_response))


def main() -> None:
    port = sys.argv[1]
    os.environ["MOTO_PORT"] = port
    app = AtomicCreations(DomainDispatcherApplication(create_backend_app))
    run_simple("127.0.0.1", int(port), app, threaded=True, request_handler=MotoRequestHandler)


if __name__ == "__main__":
    main()
