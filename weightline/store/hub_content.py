"""Content of Hub buckets: bytes to and from the Hub's content store with hf_xet, without touching any path.

Uploading gives a hash; a path of the bucket stands for a hash (`hub_bucket`). Downloads are checked against it, since
the client returns a flipped bit without an error.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any, Literal

import hf_xet
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff

from weightline.errors import DigestMismatchError, TransientStorageError

#: The content hash of a file without bytes, which no upload ever makes.
EMPTY_HASH = "0" * 64
_HTTP_TIMEOUT_SECONDS = 60.0
#: A token that is about to expire is fetched again.
_EXPIRY_MARGIN_SECONDS = 120
#: Callers ask again as well (`weightline.store.retry`): the client need not for ten minutes.
_XET_SETTINGS = {"client.retry_max_attempts": 3, "client.retry_base_delay": timedelta(milliseconds=300)}


@dataclass(frozen=True, slots=True)
class Content:
    """What a file is made of."""

    xet_hash: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class _Connection:
    endpoint: str
    token: str
    expires_at: int


class HubContent:
    """The content store as one bucket's tokens open it. Safe for threads, and after fork.

    A read or write token serves until it expires, so most transfers cost no request of the Hub's API.
    """

    def __init__(self, bucket_id: str, endpoint: str, token: str | bool | None) -> None:
        self._token = token
        self._token_url = f"{endpoint}/api/buckets/{bucket_id}/xet-{{}}-token"
        self._connections: dict[str, _Connection] = {}
        self._lock = threading.Lock()

    def upload(self, body: bytes) -> Content:
        """Store bytes. Safe to repeat: content is stored once."""
        if not body:
            return Content(EMPTY_HASH, 0)
        with _session(os.getpid()).new_upload_commit(**self._connect("write")) as commit:
            upload = commit.start_upload_bytes(bytes(body), sha256=hf_xet.SKIP_SHA256)
        return Content(str(upload.result().xet_info.hash), len(body))

    def download(self, content: Content, path: Path, key: str) -> None:
        """Write content to a new file and check it. DigestMismatchError for wrong bytes, and no file then."""
        if content.nbytes == 0:
            path.write_bytes(b"")
            return
        try:
            with _session(os.getpid()).new_file_download_group(**self._connect("read")) as group:
                group.start_download_file(hf_xet.XetFileInfo(content.xet_hash, content.nbytes), str(path))
            _check(path, content, key)
        except BaseException:
            path.unlink(missing_ok=True)
            raise

    def read(self, content: Content, key: str) -> bytes:
        """The checked bytes of a small file."""
        with tempfile.TemporaryDirectory(prefix="weightline-") as folder:
            path = Path(folder) / "content"
            self.download(content, path, key)
            return path.read_bytes()

    def _connect(self, kind: Literal["read", "write"]) -> dict[str, Any]:
        """How hf_xet reaches the content store; it fetches the next token by itself when a transfer outlives one."""
        url, headers = self._token_url.format(kind), build_hf_headers(token=self._token)
        with self._lock:
            known = self._connections.get(kind)
            if known is None or known.expires_at - _EXPIRY_MARGIN_SECONDS <= time.time():
                response = http_backoff("GET", url, headers=headers, timeout=_HTTP_TIMEOUT_SECONDS)
                hf_raise_for_status(response)
                said = response.json()
                known = _Connection(said["casUrl"], said["accessToken"], int(said["exp"]))
                self._connections[kind] = known
        return {
            "endpoint": known.endpoint,
            "token": known.token,
            "token_expiry_unix_secs": known.expires_at,
            "token_refresh_url": url,
            "token_refresh_headers": headers,
            "custom_headers": {name: value for name, value in headers.items() if name.lower() != "authorization"},
        }


def content_of(path: Path) -> Content:
    """The content hash of a local file, computed here."""
    nbytes = path.stat().st_size
    return Content(EMPTY_HASH if nbytes == 0 else str(hf_xet.hash_files([str(path)])[0].hash), nbytes)


def _check(path: Path, expected: Content, key: str) -> None:
    nbytes = path.stat().st_size if path.exists() else 0
    if nbytes != expected.nbytes:
        raise TransientStorageError(f"the download of {key} gave {nbytes} of {expected.nbytes} bytes", key=key)
    actual = content_of(path)
    if actual != expected:
        raise DigestMismatchError(
            f"{key} came with content hash {actual.xet_hash}, the Hub says {expected.xet_hash}",
            what=key, expected=expected.xet_hash, actual=actual.xet_hash,
        )  # fmt: skip


@cache
def _session(_pid: int) -> Any:
    """One session a process: its threads do not survive a fork."""
    config = hf_xet.XetConfig()
    chosen = {name: value for name, value in _XET_SETTINGS.items() if _variable(name) not in os.environ}
    return hf_xet.XetSession(config.with_config(chosen) if chosen else config)


def _variable(setting: str) -> str:
    """The environment variable of a client's setting: what a user chose there wins."""
    return f"HF_XET_{setting.replace('.', '_').upper()}"
