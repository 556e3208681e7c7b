"""One Hub bucket by its own API: paths and the content that each stands for.

The API has no conditions: a write replaces, whatever stood there. What makes one writer win is in `claims.py`.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from huggingface_hub import BucketFile, HfApi
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    build_hf_headers,
    disable_progress_bars,
    enable_progress_bars,
    hf_raise_for_status,
    http_backoff,
)

from weightline.errors import NotFoundError, StorageError, TransientStorageError, WeightlineError
from weightline.store.hub.content import Content, HubContent, content_beside
from weightline.store.hub.errors import hub_errors, is_missing_bucket

_HTTP_TIMEOUT_SECONDS = 60.0

_NUM_REPEATS = 5

#: How long a write may take to be seen by a read of the same path.
_VISIBLE_AFTER_SECONDS = (0.0, 0.1, 0.3, 0.6, 1.0, 2.0, 4.0)

#: Words of the Hub about an operation that will never work.
_PERMANENT = ("invalid", "forbidden", "not allowed", "permission", "quota", "exceed", "too large")

Operation = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class HubFile:
    """What the bucket says of a path. `uploaded_at` is the Hub's clock, at the write of the path; None when untold."""

    path: str
    content: Content
    uploaded_at: datetime | None


class HubBucket:
    """A bucket, its paths relative to the bucket itself. Safe for threads.

    Reads of a bucket that does not exist find nothing; the first write creates it, private. All methods raise the
    project's errors; `url` stands in them.
    """

    def __init__(self, bucket_id: str, url: str, *, endpoint: str, token: str | bool | None) -> None:
        self.url = url
        self.bucket_id = bucket_id
        self._token = token
        self._api = HfApi(endpoint=endpoint, token=token)
        self._batch_url = f"{endpoint}/api/buckets/{bucket_id}/batch"
        self._content = HubContent(bucket_id, endpoint, token)
        self._is_there = False
        self._lock = threading.Lock()

    def require(self) -> None:
        """Before writing: the bucket exists, or is created, private. Once a process; safe to repeat and to race."""
        with self._lock:
            if self._is_there:
                return
            try:
                with hub_errors(self.url):
                    self._api.bucket_info(self.bucket_id)
            except NotFoundError as error:
                self._create(error)
            self._is_there = True

    def _create(self, missing: NotFoundError) -> None:
        try:
            with hub_errors(self.url):
                self._api.create_bucket(self.bucket_id, private=True, exist_ok=True)
        except TransientStorageError:
            raise
        except WeightlineError as error:
            raise StorageError(
                f"{self.url}: there is no bucket {self.bucket_id} that this token sees, and it may not create one "
                f"({error}). Create it on the Hub, or use a token that may write for its owner",
                url=self.url,
            ) from missing

    def find(self, paths: Sequence[str]) -> dict[str, HubFile]:
        """Those of the paths that exist. One request for a thousand."""
        found: list[HubFile] = []
        with self._reading(paths[0] if paths else ""):
            found = [_parsed(file) for file in self._api.get_bucket_paths_info(self.bucket_id, paths)]
        return {file.path: file for file in found}

    def below(self, folder: str) -> list[HubFile]:
        """All files below a folder (with or without its slash; empty for all), in path order. A request a page."""
        found: list[HubFile] = []
        with self._reading(folder):
            entries = self._api.list_bucket_tree(self.bucket_id, folder.strip("/") or None, recursive=True)
            found = [_parsed(entry) for entry in entries if isinstance(entry, BucketFile)]
        prefix = f"{folder.strip('/')}/" if folder.strip("/") else ""
        return sorted((f for f in found if f.path.startswith(prefix)), key=lambda f: f.path)

    def upload(self, body: bytes) -> Content:
        """Bytes to the content store; no path stands for them yet."""
        self.require()
        with hub_errors(self.url):
            return self._content.upload(body)

    def upload_file(self, path: Path, target: str) -> Content:
        """A local file to the path, with the client's batch call; its content, hashed here while it goes up."""
        self.require()
        with hub_errors(self.url, target), _without_bars():
            return content_beside(path, lambda: self._add(path, target))

    def _add(self, path: Path, target: str) -> None:
        try:
            self._api.batch_bucket_files(self.bucket_id, add=[(path, target)])
        except OSError as error:
            _raise_failures(getattr(error, "failures", None) or (), self.url)
            raise

    def download(self, file: HubFile, path: Path) -> None:
        """The file's content to a new local file, checked."""
        with hub_errors(self.url, file.path):
            self._content.download(file.content, path, file.path)

    def read(self, file: HubFile) -> bytes:
        with hub_errors(self.url, file.path):
            return self._content.read(file.content, file.path)

    def write(self, path: str, content: Content, *, is_repeated: bool = True) -> None:
        """Let the path stand for uploaded content. With `is_repeated=False` the request is sent exactly once."""
        operation = {"type": "addFile", "path": path, "xetHash": content.xet_hash, "mtime": int(time.time() * 1000)}
        self._post([operation], is_repeated=is_repeated)

    def remove(self, paths: Iterable[str]) -> None:
        """Remove paths. Safe to repeat: what is not there is no error."""
        paths = list(paths)
        if not paths:
            return
        try:
            self._post([{"type": "deleteFile", "path": path} for path in paths])
        except NotFoundError as error:
            if not is_missing_bucket(error):
                raise
        except StorageError:
            if self.find(paths):
                raise

    def await_content(self, path: str, expected: Content) -> None:
        """Return once the bucket says that the path stands for this content. TransientStorageError when it does not."""
        found: HubFile | None = None
        for pause in _VISIBLE_AFTER_SECONDS:
            time.sleep(pause)
            found = self.find([path]).get(path)
            if found is not None and found.content == expected:
                return
        said = "is not there" if found is None else f"has {found.content.nbytes} bytes, hash {found.content.xet_hash}"
        raise TransientStorageError(
            f"{path} was written to {self.url} with {expected.nbytes} bytes, hash {expected.xet_hash}, and {said}",
            url=self.url, key=path,
        )  # fmt: skip

    def _post(self, operations: Sequence[Operation], *, is_repeated: bool = True) -> None:
        """Operations are applied one by one, not as a transaction; each failure is told."""
        headers = build_hf_headers(token=self._token) | {"Content-Type": "application/x-ndjson"}
        body = b"".join(json.dumps(operation).encode() + b"\n" for operation in operations)
        with hub_errors(self.url):
            response = http_backoff(
                "POST", self._batch_url, headers=headers, content=body, timeout=_HTTP_TIMEOUT_SECONDS,
                max_retries=_NUM_REPEATS if is_repeated else 0,
            )  # fmt: skip
            if response.status_code in (200, 422):
                _raise_failures(response.json().get("failed") or (), self.url)
            hf_raise_for_status(response)

    @contextmanager
    def _reading(self, key: str) -> Iterator[None]:
        """A bucket that is not there reads as an empty one."""
        try:
            with hub_errors(self.url, key):
                yield
        except NotFoundError:
            return


def _raise_failures(failures: Sequence[Mapping[str, str]], url: str) -> None:
    """The operations that a batch lists as failed, whatever its status was."""
    if not failures:
        return
    told = "; ".join(f"{failure.get('path')}: {failure.get('error')}" for failure in failures[:5])
    is_permanent = any(word in told.lower() for word in _PERMANENT)
    cls = StorageError if is_permanent else TransientStorageError
    raise cls(f"{url}: {len(failures)} operations failed ({told})", url=url, key=str(failures[0].get("path")))


def _parsed(file: Any) -> HubFile:
    return HubFile(file.path, Content(file.xet_hash, file.size), file.uploaded_at)


class _Bars:
    """The client draws a bar for each call; a trainer that commits a version every few seconds shows its own."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.num_hiding = 0
        self.restore: Callable[[], None] | None = None


_bars = _Bars()


@contextmanager
def _without_bars() -> Iterator[None]:
    with _bars.lock:
        if _bars.num_hiding == 0 and not are_progress_bars_disabled():
            disable_progress_bars()
            _bars.restore = enable_progress_bars
        _bars.num_hiding += 1
    try:
        yield
    finally:
        with _bars.lock:
            _bars.num_hiding -= 1
            if _bars.num_hiding == 0 and _bars.restore is not None:
                _bars.restore()
                _bars.restore = None
