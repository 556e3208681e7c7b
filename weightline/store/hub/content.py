"""Moves bytes to and from the Hub's content store with hf_xet, without touching any path of a bucket.

An upload returns a hash; a path of the bucket refers to a hash (bucket.py). Downloads are checked against it, since the
client returns a flipped bit without an error.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any, Literal

import hf_xet
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff

from weightline.errors import DigestMismatchError, TransientStorageError
from weightline.store.hub.hashing import hash_arriving, hash_beside, xet_hash
from weightline.store.transfers import moved

#: The content hash of a file without bytes, which no upload ever makes.
EMPTY_HASH = "0" * 64

_HTTP_TIMEOUT_SECONDS = 60.0

#: A token that is about to expire is fetched again.
_EXPIRY_MARGIN_SECONDS = 120

_WAIT_SECONDS = 0.2

_BLOCK_NBYTES = 16_000_000

_BUFFER_NBYTES = 4 * _BLOCK_NBYTES

#: Bound for all downloads of a process together.
_ALL_BUFFERS_NBYTES = 4 * _BUFFER_NBYTES

#: Groups of settings of the client. A group is left alone when the environment sets any part of it.
_XET_SETTINGS: tuple[dict[str, object], ...] = (
    # The client's own retries take up to ten minutes. `weightline.store.retry` retries as well, so few are needed.
    {"client.retry_max_attempts": 3},
    {"client.retry_base_delay": timedelta(milliseconds=300)},
    # A file is fetched by blocks, several at a time, and a block is written when all of it has arrived. The default of
    # 256 MB exceeds most payloads, so that hashing could not start before the whole file has arrived.
    {f"reconstruction.{end}_reconstruction_fetch_size": _BLOCK_NBYTES for end in ("min", "max")},
    # Bytes that have arrived and are not written yet. The default is up to 6 GB, and writing is slower than fetching.
    {
        "reconstruction.download_buffer_size": _BUFFER_NBYTES,
        "reconstruction.download_buffer_perfile_size": _BUFFER_NBYTES,
        "reconstruction.download_buffer_limit": _ALL_BUFFERS_NBYTES,
        "reconstruction.min_prefetch_buffer": _BUFFER_NBYTES,
    },
)


@dataclass(frozen=True, slots=True)
class Content:
    """The content of a file: its hash in the content store, and its size."""

    xet_hash: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class _Connection:
    endpoint: str
    token: str
    expires_at: int


class HubContent:
    """Access to the content store with the tokens of one bucket. Safe for threads, and after fork.

    A read or write token is reused until it expires, so most transfers cost no request of the Hub's API. Downloads
    share one client of the content store, with its connections.
    """

    def __init__(self, bucket_id: str, endpoint: str, token: str | bool | None) -> None:
        self._token = token
        self._token_url = f"{endpoint}/api/buckets/{bucket_id}/xet-{{}}-token"
        self._connections: dict[str, _Connection] = {}
        self._group: tuple[tuple[int, str], Any] | None = None
        self._lock = threading.Lock()

    def upload(self, body: bytes) -> Content:
        """Stores bytes and returns their content. Safe to repeat: equal content is stored once."""
        if not body:
            return Content(EMPTY_HASH, 0)
        with _session(os.getpid()).new_upload_commit(**self._connect("write")) as commit:
            upload = commit.start_upload_bytes(bytes(body), sha256=hf_xet.SKIP_SHA256)
        return Content(str(upload.result().xet_info.hash), len(body))

    def download(self, content: Content, path: Path, key: str) -> None:
        """Writes content to a new file and checks it. DigestMismatchError for wrong bytes.

        After any error there is no file at `path`.
        """
        if content.nbytes == 0:
            path.write_bytes(b"")
            return
        try:
            arrived = hash_arriving(path, content.nbytes, lambda: self._fetch(content, path, key))
            _check(path, content, key, arrived)
        except BaseException:
            path.unlink(missing_ok=True)
            raise

    def _fetch(self, content: Content, path: Path, key: str) -> None:
        download = self._downloads().start_download_file(
            hf_xet.XetFileInfo(content.xet_hash, content.nbytes), str(path)
        )
        thread, reported_nbytes = ThreadPoolExecutor(1, thread_name_prefix="weightline-wait"), 0
        try:
            # Ctrl-C interrupts neither the client's own waiting nor, once the client was used, a wait without timeout.
            waiting = thread.submit(download.result)
            while not waiting.done():
                wait((waiting,), _WAIT_SECONDS)
                reported_nbytes = _report_progress(download, reported_nbytes)
            waiting.result()
        except KeyboardInterrupt:
            download.cancel()
            raise
        finally:
            thread.shutdown()
        nbytes = path.stat().st_size if path.exists() else 0
        if nbytes != content.nbytes:
            raise TransientStorageError(f"the download of {key} gave {nbytes} of {content.nbytes} bytes", key=key)
        moved(content.nbytes - reported_nbytes)

    def read(self, content: Content, key: str) -> bytes:
        """Returns the checked bytes of a small file."""
        with tempfile.TemporaryDirectory(prefix="weightline-") as folder:
            path = Path(folder) / "content"
            self.download(content, path, key)
            return path.read_bytes()

    def _downloads(self) -> Any:
        """Returns the client's download group. It is kept, since opening one reads the host's certificates: 20 ms."""
        connection = self._connect("read")
        opened_for = (os.getpid(), connection["token"])
        with self._lock:
            if self._group is None or self._group[0] != opened_for:
                self._group = opened_for, _session(os.getpid()).new_file_download_group(**connection)
            return self._group[1]

    def _connect(self, kind: Literal["read", "write"]) -> dict[str, Any]:
        """Returns the arguments by which hf_xet connects to the content store.

        hf_xet fetches the next token by itself when a transfer outlives one.
        """
        url, headers = self._token_url.format(kind), build_hf_headers(token=self._token)
        with self._lock:
            known = self._connections.get(kind)
            if known is None or known.expires_at - _EXPIRY_MARGIN_SECONDS <= time.time():
                response = http_backoff("GET", url, headers=headers, timeout=_HTTP_TIMEOUT_SECONDS)
                hf_raise_for_status(response)
                reply = response.json()
                known = _Connection(reply["casUrl"], reply["accessToken"], int(reply["exp"]))
                self._connections[kind] = known
        return {
            "endpoint": known.endpoint,
            "token": known.token,
            "token_expiry_unix_secs": known.expires_at,
            "token_refresh_url": url,
            "token_refresh_headers": headers,
            "custom_headers": {name: value for name, value in headers.items() if name.lower() != "authorization"},
        }


def _report_progress(download: Any, reported_nbytes: int) -> int:
    """Reports to the watchers the bytes beyond `reported_nbytes`. Returns the number of bytes reported so far."""
    progress = download.progress()
    if progress is None or progress.bytes_completed <= reported_nbytes:
        return reported_nbytes
    moved(progress.bytes_completed - reported_nbytes)
    return int(progress.bytes_completed)


def content_beside(path: Path, work: Callable[[], None]) -> Content:
    """Runs `work`, and computes the content of the local file at the same time."""
    nbytes = path.stat().st_size
    if nbytes == 0:
        work()
        return Content(EMPTY_HASH, 0)
    return Content(hash_beside(path, work), nbytes)


def _check(path: Path, expected: Content, key: str, arrived: str) -> None:
    """Checks the hash of the bytes that arrived, and if it differs, that of the file. DigestMismatchError."""
    if arrived == expected.xet_hash:
        return
    actual = xet_hash(path)
    if actual != expected.xet_hash:
        raise DigestMismatchError(
            f"{key} was downloaded with content hash {actual}; the Hub lists {expected.xet_hash}",
            what=key, expected=expected.xet_hash, actual=actual,
        )  # fmt: skip


@cache
def _session(_pid: int) -> Any:
    """Returns the session of a process. Its threads do not survive a fork, so each process has its own."""
    return hf_xet.XetSession(client_config())


def client_config() -> Any:
    """Returns the client's settings: those of the environment first, then `_XET_SETTINGS`, then its defaults."""
    config = hf_xet.XetConfig()
    for settings in _XET_SETTINGS:
        if not any(_variable(name) in os.environ for name in settings):
            config = config.with_config(settings)
    return config


def _variable(setting: str) -> str:
    """Returns the environment variable of a setting of the client."""
    return f"HF_XET_{setting.replace('.', '_').upper()}"
