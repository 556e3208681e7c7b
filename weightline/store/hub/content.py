"""Content of Hub buckets: bytes to and from the Hub's content store with hf_xet, without touching any path.

Uploading gives a hash; a path of the bucket stands for a hash (bucket.py). Downloads are checked against it, since the
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

#: Of all downloads of a process together.
_ALL_BUFFERS_NBYTES = 4 * _BUFFER_NBYTES

#: What we set of the client, unless the environment sets any part of it.
_XET_SETTINGS: tuple[dict[str, object], ...] = (
    # Callers ask again as well (`weightline.store.retry`): the client need not for ten minutes.
    {"client.retry_max_attempts": 3},
    {"client.retry_base_delay": timedelta(milliseconds=300)},
    # A file is fetched by blocks, several at a time, and a block is written when the whole of it came. By the client's
    # own choice blocks have 256 MB, more than most payloads: nothing could be hashed before everything is there.
    {f"reconstruction.{end}_reconstruction_fetch_size": _BLOCK_NBYTES for end in ("min", "max")},
    # What came and is not written yet: by the client's own choice up to 6 GB, and it writes slower than it fetches.
    {
        "reconstruction.download_buffer_size": _BUFFER_NBYTES,
        "reconstruction.download_buffer_perfile_size": _BUFFER_NBYTES,
        "reconstruction.download_buffer_limit": _ALL_BUFFERS_NBYTES,
        "reconstruction.min_prefetch_buffer": _BUFFER_NBYTES,
    },
)


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

    A read or write token serves until it expires, so most transfers cost no request of the Hub's API. Downloads share
    one client of the content store, with its connections.
    """

    def __init__(self, bucket_id: str, endpoint: str, token: str | bool | None) -> None:
        self._token = token
        self._token_url = f"{endpoint}/api/buckets/{bucket_id}/xet-{{}}-token"
        self._connections: dict[str, _Connection] = {}
        self._group: tuple[tuple[int, str], Any] | None = None
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
            arrived = hash_arriving(path, content.nbytes, lambda: self._fetch(content, path, key))
            _check(path, content, key, arrived)
        except BaseException:
            path.unlink(missing_ok=True)
            raise

    def _fetch(self, content: Content, path: Path, key: str) -> None:
        download = self._downloads().start_download_file(
            hf_xet.XetFileInfo(content.xet_hash, content.nbytes), str(path)
        )
        thread, num_told = ThreadPoolExecutor(1, thread_name_prefix="weightline-wait"), 0
        try:
            # Ctrl-C interrupts neither the client's own waiting nor, once the client was used, a wait without an end.
            waiting = thread.submit(download.result)
            while not waiting.done():
                wait((waiting,), _WAIT_SECONDS)
                num_told = _tell(download, num_told)
            waiting.result()
        except KeyboardInterrupt:
            download.cancel()
            raise
        finally:
            thread.shutdown()
        nbytes = path.stat().st_size if path.exists() else 0
        if nbytes != content.nbytes:
            raise TransientStorageError(f"the download of {key} gave {nbytes} of {content.nbytes} bytes", key=key)
        moved(content.nbytes - num_told)

    def read(self, content: Content, key: str) -> bytes:
        """The checked bytes of a small file."""
        with tempfile.TemporaryDirectory(prefix="weightline-") as folder:
            path = Path(folder) / "content"
            self.download(content, path, key)
            return path.read_bytes()

    def _downloads(self) -> Any:
        """Where downloads start. It is kept with its connections: to open one reads the host's certificates, 20 ms."""
        connection = self._connect("read")
        opened_for = (os.getpid(), connection["token"])
        with self._lock:
            if self._group is None or self._group[0] != opened_for:
                self._group = opened_for, _session(os.getpid()).new_file_download_group(**connection)
            return self._group[1]

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


def _tell(download: Any, num_told: int) -> int:
    """Tell whoever watches what came since `num_told` bytes had; how many have come now."""
    progress = download.progress()
    if progress is None or progress.bytes_completed <= num_told:
        return num_told
    moved(progress.bytes_completed - num_told)
    return int(progress.bytes_completed)


def content_beside(path: Path, work: Callable[[], None]) -> Content:
    """Run `work` and compute, from the local file, what a path that holds it stands for."""
    nbytes = path.stat().st_size
    if nbytes == 0:
        work()
        return Content(EMPTY_HASH, 0)
    return Content(hash_beside(path, work), nbytes)


def _check(path: Path, expected: Content, key: str, arrived: str) -> None:
    """The hash of the bytes that arrived is right, or that of the file is; DigestMismatchError otherwise."""
    if arrived == expected.xet_hash:
        return
    actual = xet_hash(path)
    if actual != expected.xet_hash:
        raise DigestMismatchError(
            f"{key} came with content hash {actual}, the Hub says {expected.xet_hash}",
            what=key, expected=expected.xet_hash, actual=actual,
        )  # fmt: skip


@cache
def _session(_pid: int) -> Any:
    """One session a process: its threads do not survive a fork."""
    return hf_xet.XetSession(client_config())


def client_config() -> Any:
    """The client's settings: what the environment says, then ours, then its own."""
    config = hf_xet.XetConfig()
    for settings in _XET_SETTINGS:
        if not any(_variable(name) in os.environ for name in settings):
            config = config.with_config(settings)
    return config


def _variable(setting: str) -> str:
    """The environment variable of a client's setting: what a user chose there wins."""
    return f"HF_XET_{setting.replace('.', '_').upper()}"
