"""The part of the Hub's HTTP API that committing a folder to a model repository takes, in memory."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class ModelRepos(ThreadingHTTPServer):
    """Repositories by name, and what was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, dict[str, bytes]] = {}
        self.messages: list[str] = []
        self.is_private: dict[str, bool] = {}
        self.refuses = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def serving_repos() -> Iterator[ModelRepos]:
    repos = ModelRepos()
    thread = threading.Thread(target=repos.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield repos
    finally:
        repos.shutdown()
        repos.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: ModelRepos
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.server.refuses or self.headers.get("Authorization") != "Bearer hf_test":
            self._reply(403, {"error": "not yours"})
        elif self.path == "/api/repos/create":
            self._create(json.loads(raw))
        elif self.path == "/api/validate-yaml":
            self._reply(200, {"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            asked = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(raw)["files"]
            ]
            self._reply(200, {"files": asked})
        elif "/commit/" in self.path:
            self._commit(self.path.split("/api/models/")[1].split("/commit/")[0], raw)
        else:
            self._reply(404, {"error": self.path})

    def do_GET(self) -> None:
        self._reply(404, {"error": self.path})

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        is_new = name not in self.server.files
        self.server.files.setdefault(name, {})
        self.server.is_private.setdefault(name, asked.get("visibility", "") == "private" or bool(asked.get("private")))
        self._reply(200 if is_new else 409, {"url": f"{self.server.url}/{name}", "id": name})

    def _commit(self, name: str, raw: bytes) -> None:
        for line in map(json.loads, raw.splitlines()):
            if line["key"] == "header":
                self.server.messages.append(line["value"]["summary"])
            elif line["key"] == "file":
                self.server.files[name][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        url = f"{self.server.url}/{name}/commit/{'0' * 40}"
        self._reply(200, {"commitUrl": url, "commitOid": "0" * 40, "hookOutput": "", "success": True})

    def _reply(self, status: int, document: dict[str, Any]) -> None:
        body = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""
