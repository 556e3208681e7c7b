"""Reads and writes one Hub bucket by its own API: paths, and the content that each path refers to.

The API has no conditional writes: a write replaces an existing path. `claims.py` builds create-only puts on top.
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

#: Pauses between reads of a path that was just written, until the read shows the write. They stay short: the real Hub
#: has taken 2.5 s, and every pause that is longer than needed delays a commit.
VISIBLE_PAUSES_SECONDS = (0.0, 0.1, 0.2, 0.2, *[0.5] * 15)

#: Parts of the Hub's error messages that mark a failure as permanent.
_PERMANENT = ("invalid", "forbidden", "not allowed", "permission", "quota", "exceed", "too large")

Operation = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class HubFile:
    """A path of the bucket. `uploaded_at` is the time of its write by the Hub's clock; None when the Hub omits it."""

    path: str
    content: Content
    uploaded_at: datetime | None


class HubBucket:
    """A bucket. Paths are relative to the bucket, without any prefix of the chain. Safe for threads.

    Reads of a bucket that does not exist find nothing; the first write creates it, private. All methods raise the
    project's errors, whose messages name `url`.
    """

    def __init__(
        self,
        bucket_id: str,
        url: str,
        *,
        endpoint: str,
        token: str | bool | None,
        visible_pauses_seconds: Sequence[float] = VISIBLE_PAUSES_SECONDS,
    ) -> None:
        self.url = url
        self.bucket_id = bucket_id
        self._token = token
        self._visible_pauses_seconds = visible_pauses_seconds
        self._api = HfApi(endpoint=endpoint, token=token)
        self._batch_url = f"{endpoint}/api/buckets/{bucket_id}/batch"
        self._content = HubContent(bucket_id, endpoint, token)
        self._is_there = False
        self._lock = threading.Lock()

    def require(self) -> None:
        """Creates the bucket, private, if it does not exist. Checks once per process. Safe to repeat and to race."""
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
                f"{self.url}: this token cannot see a bucket {self.bucket_id}, and is not allowed to create one "
                f"({error}). Create it on the Hub, or use a token that may write for its owner",
                url=self.url,
            ) from missing

    def find(self, paths: Sequence[str]) -> dict[str, HubFile]:
        """Returns those of the paths that exist, by path. Sends one request per 1000 paths."""
        found: list[HubFile] = []
        with self._reading(paths[0] if paths else ""):
            found = [_parsed(file) for file in self._api.get_bucket_paths_info(self.bucket_id, paths)]
        return {file.path: file for file in found}

    def below(self, folder: str) -> list[HubFile]:
        """Returns all files below a folder, in path order. Sends one request per page.

        `folder` may end with a slash or not; empty means the whole bucket.
        """
        found: list[HubFile] = []
        with self._reading(folder):
            entries = self._api.list_bucket_tree(self.bucket_id, folder.strip("/") or None, recursive=True)
            found = [_parsed(entry) for entry in entries if isinstance(entry, BucketFile)]
        prefix = f"{folder.strip('/')}/" if folder.strip("/") else ""
        return sorted((f for f in found if f.path.startswith(prefix)), key=lambda f: f.path)

    def upload(self, body: bytes) -> Content:
        """Uploads bytes to the content store. No path refers to them until `write` is called."""
        self.require()
        with hub_errors(self.url):
            return self._content.upload(body)

    def upload_file(self, path: Path, target: str) -> Content:
        """Uploads a local file to the path by the client's batch call. Returns its content, hashed meanwhile."""
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
        """Downloads the file's content to a new local file and checks it."""
        with hub_errors(self.url, file.path):
            self._content.download(file.content, path, file.path)

    def read(self, file: HubFile) -> bytes:
        with hub_errors(self.url, file.path):
            return self._content.read(file.content, file.path)

    def write(self, path: str, content: Content, *, is_repeated: bool = True) -> None:
        """Makes the path refer to uploaded content. With `is_repeated=False` the request is sent exactly once."""
        operation = {"type": "addFile", "path": path, "xetHash": content.xet_hash, "mtime": int(time.time() * 1000)}
        self._post([operation], is_repeated=is_repeated)

    def remove(self, paths: Iterable[str]) -> None:
        """Removes paths. Safe to repeat: a missing path is no error."""
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
        """Waits until reads show that the path refers to this content. TransientStorageError when they never do."""
        found: HubFile | None = None
        for pause in self._visible_pauses_seconds:
            time.sleep(pause)
            found = self.find([path]).get(path)
            if found is not None and found.content == expected:
                return
        shown = "is missing" if found is None else f"has {found.content.nbytes} bytes, hash {found.content.xet_hash}"
        raise TransientStorageError(
            f"{path} was written to {self.url} with {expected.nbytes} bytes, hash {expected.xet_hash}; read back, it "
            f"{shown}",
            url=self.url, key=path,
        )  # fmt: skip

    def _post(self, operations: Sequence[Operation], *, is_repeated: bool = True) -> None:
        """Posts a batch. The Hub applies its operations one by one, not as a transaction, and lists each failure."""
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
        """Suppresses NotFoundError, so that a missing bucket reads as an empty one."""
        try:
            with hub_errors(self.url, key):
                yield
        except NotFoundError:
            return


def _raise_failures(failures: Sequence[Mapping[str, str]], url: str) -> None:
    """Raises an error for the operations that a batch reply lists as failed, whatever its status is."""
    if not failures:
        return
    details = "; ".join(f"{failure.get('path')}: {failure.get('error')}" for failure in failures[:5])
    is_permanent = any(text in details.lower() for text in _PERMANENT)
    cls = StorageError if is_permanent else TransientStorageError
    raise cls(f"{url}: {len(failures)} operations failed ({details})", url=url, key=str(failures[0].get("path")))


def _parsed(file: Any) -> HubFile:
    return HubFile(file.path, Content(file.xet_hash, file.size), file.uploaded_at)


class _Bars:
    """Counts the calls during which the client's progress bars are off.

    The client draws a bar for each call, which would flood the output of a trainer that commits every few seconds.
    """

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
