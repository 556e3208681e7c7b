"""A Hugging Face Hub bucket: `hf://buckets/<owner>/<name>/<prefix>`, through huggingface_hub and hf_xet.

Reads and uploads go through the Hub's own API. For the one write that commits there are two modes:

- `s3-gateway`: one request with `If-None-Match: *` to the Hub's S3 gateway, when its keys are in the environment
  (`HF_S3_ACCESS_KEY_ID`, `HF_S3_SECRET_ACCESS_KEY`; `HF_S3_ENDPOINT` for another gateway);
- `claims`: with a token alone; see `weightline.store.hub.claims`.

A writer with keys joins the claims of a key that has any, so that writers of both modes agree on a winner.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from huggingface_hub import get_token

from weightline.errors import InputError, NotFoundError, TransientStorageError
from weightline.store import transfers
from weightline.store.base import MAX_GET_NBYTES, Contest, ObjectInfo, Store, checked_key, require_nbytes
from weightline.store.hub.bucket import VISIBLE_PAUSES_SECONDS, HubBucket, HubFile
from weightline.store.hub.claims import CLAIMS, VISIBLE_SECONDS, ClaimLog
from weightline.store.transfers import moved

_SCHEME = "hf://"

_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9])?")

DEFAULT_ENDPOINT = "https://huggingface.co"

DEFAULT_S3_ENDPOINT = "https://s3.hf.co"

_S3_REGION = "us-east-1"

#: Must exceed the skew between the Hub's servers, not the lag of its listings: see `claims.py`.
DEFAULT_SETTLE_SECONDS = 2.0
_SEEN_SECONDS = 12.0


@dataclass(frozen=True, slots=True)
class HubUrl:
    """A prefix of a Hub bucket. `root` is prepended to every key: empty, or a path with a slash at its end."""

    owner: str
    name: str
    root: str

    @property
    def bucket_id(self) -> str:
        return f"{self.owner}/{self.name}"

    @property
    def text(self) -> str:
        return f"{_SCHEME}buckets/{self.bucket_id}/{self.root}".rstrip("/")


def parse_hub_url(url: str) -> HubUrl:
    """Returns the bucket and prefix that the URL names. InputError for any other `hf://` URL."""
    kind, *parts = url.removeprefix(_SCHEME).rstrip("/").split("/")
    if not url.startswith(_SCHEME) or kind != "buckets" or len(parts) < 2:
        raise InputError(f"{url}: a Hub bucket's URL is hf://buckets/<owner>/<name>/<prefix>", url=url)
    owner, name, *below = parts
    for part in (owner, name):
        if not _NAME.fullmatch(part):
            raise InputError(
                f"{url}: {part!r} is not a valid name on the Hub: use up to 96 letters, digits, '.', '_' and '-'",
                url=url,
            )
    if any(character in url for character in "?#%"):
        raise InputError(f"{url}: a Hub bucket's URL has no '?', '#' or '%'", url=url)
    return HubUrl(owner, name, f"{checked_key('/'.join(below))}/" if below else "")


class HubStore:
    """Implements `Store` on a prefix of a Hub bucket. Safe for threads, and for processes that open it themselves.

    Files are checked against the Hub's content hash after each upload and download.
    """

    def __init__(self, url: HubUrl, bucket: HubBucket, claims: ClaimLog, gateway: Store | None) -> None:
        self.url = url.text
        self._root = url.root
        self._bucket = bucket
        self._claims = claims
        self._gateway = gateway

    @property
    def commit_mode(self) -> str:
        """Names the mechanism that makes `put_if_absent` exclusive: `s3-gateway` or `claims`."""
        return "claims" if self._gateway is None else "s3-gateway"

    def get(self, key: str, max_nbytes: int = MAX_GET_NBYTES) -> bytes:
        file = self._existing(key)
        require_nbytes(self.url, key, file.content.nbytes, at_most=max_nbytes)
        return self._bucket.read(file)

    def get_file(self, key: str, path: Path, nbytes: int | None = None) -> None:
        """Downloads the object from its start and checks it. A failure leaves no file at `path`."""
        file = self._existing(key)
        require_nbytes(self.url, key, file.content.nbytes, exactly=nbytes)
        transfers.discard(path)
        self._bucket.download(file, path)

    def put_if_absent(self, key: str, body: bytes) -> None:
        checked_key(key)
        if self._gateway is None or self._claims.claims(key):
            self._claims.put_if_absent(key, body)
        else:
            self._bucket.require()
            self._gateway.put_if_absent(key, body)
            self._await_seen(key)
        moved(len(body))

    def put(self, key: str, body: bytes) -> None:
        path = self._path(key)
        self._bucket.write(path, self._bucket.upload(body))
        moved(len(body))

    def put_file(self, key: str, path: Path) -> None:
        """Uploads in one batch call, then compares the size and content hash that the Hub lists with the file's."""
        target = self._path(key)
        content = self._bucket.upload_file(path, target)
        self._bucket.await_content(target, content)
        moved(content.nbytes)

    def head(self, key: str) -> ObjectInfo | None:
        path = self._path(key)
        found = self._bucket.find([path]).get(path)
        return None if found is None else self._info(found)

    def list(self, prefix: str, start_after: str = "") -> Iterator[ObjectInfo]:
        """Yields the objects in key order. Reads all pages of the folder first, since the Hub promises no order."""
        folder = prefix.rpartition("/")[0]
        for file in self._bucket.below(f"{self._root}{folder}"):
            info = self._info(file)
            if info.key.startswith(prefix) and info.key > start_after and not info.key.startswith(CLAIMS):
                yield info

    def delete(self, *keys: str) -> None:
        """Removes the claims of the keys, then the objects: the next writer would publish a remaining claim again."""
        paths = [self._path(key) for key in keys]
        self._bucket.remove([claim.path for claim in self._claims.claims_of(keys)])
        self._bucket.remove(paths)

    @property
    def staging_prefix(self) -> str:
        """Returns an empty prefix: uploaded content without a path belongs to no bucket."""
        return ""

    def contests(self) -> tuple[Contest, ...]:
        """Returns the keys whose claims contradict each other, or that were won and never published."""
        return tuple(self._claims.forks())

    def _await_seen(self, key: str) -> None:
        """Waits until the API, which readers use, shows an object that was created through the gateway.

        TransientStorageError when it does not show in time.
        """
        path = self._path(key)
        waited, pause = 0.0, 0.1
        while path not in self._bucket.find([path]):
            if waited > _SEEN_SECONDS:
                raise TransientStorageError(f"{key} was created in {self.url} and does not show", key=key, url=self.url)
            time.sleep(pause)
            waited, pause = waited + pause, min(2 * pause, 0.5)

    def _existing(self, key: str) -> HubFile:
        path = self._path(key)
        found = self._bucket.find([path]).get(path)
        if found is None:
            raise NotFoundError(f"no object {key} in {self.url}", key=key)
        return found

    def _path(self, key: str) -> str:
        return f"{self._root}{checked_key(key)}"

    def _info(self, file: HubFile) -> ObjectInfo:
        # An object without an upload time counts as new, so that garbage collection keeps it.
        modified_at = file.uploaded_at or datetime.now(UTC)
        return ObjectInfo(file.path.removeprefix(self._root), file.content.nbytes, modified_at)


def open_hub(
    url: str,
    *,
    claim_visible_seconds: float = VISIBLE_SECONDS,
    write_visible_pauses_seconds: Sequence[float] = VISIBLE_PAUSES_SECONDS,
) -> HubStore:
    """Returns the store that a Hub URL names. Reads and writes nothing. InputError for a bad URL, token or setting.

    `claim_visible_seconds`: the time that a claim may take to show in a listing. `write_visible_pauses_seconds`: the
    pauses between reads of a path that was just written, until the read shows the write.
    """
    parsed = parse_hub_url(url)
    endpoint = (os.environ.get("HF_ENDPOINT") or DEFAULT_ENDPOINT).rstrip("/")
    bucket = HubBucket(
        parsed.bucket_id, parsed.text, endpoint=endpoint, token=_token(url),
        visible_pauses_seconds=write_visible_pauses_seconds,
    )  # fmt: skip
    claims = ClaimLog(bucket, parsed.root, _settle_seconds(), claim_visible_seconds)
    return HubStore(parsed, bucket, claims, _gateway(parsed))


def _token(url: str) -> str | bool:
    """Returns the token of HF_TOKEN or of the stored login; False without one, for public buckets only. InputError."""
    token: str | None = get_token()
    if token is None:
        return False
    if not token.isascii() or not token.isprintable() or " " in token:
        raise InputError(f"{url}: the Hub token has characters that no token has. Copy it again", url=url)
    return token


def _settle_seconds() -> float:
    text = os.environ.get("WEIGHTLINE_HUB_SETTLE_SECONDS", str(DEFAULT_SETTLE_SECONDS))
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds <= 600:
        raise InputError(f"WEIGHTLINE_HUB_SETTLE_SECONDS is {text!r}: give seconds, above 0 and up to 600")
    return seconds


def _gateway(url: HubUrl) -> Store | None:
    """Returns the Hub's S3 gateway onto the same prefix; None when its keys are not configured."""
    key_id, secret = os.environ.get("HF_S3_ACCESS_KEY_ID"), os.environ.get("HF_S3_SECRET_ACCESS_KEY")
    if not key_id and not secret:
        return None
    if not key_id or not secret:
        raise InputError("only one of HF_S3_ACCESS_KEY_ID and HF_S3_SECRET_ACCESS_KEY is set: set both, or none")
    from weightline.store.objects.clients import open_s3

    endpoint = (os.environ.get("HF_S3_ENDPOINT") or DEFAULT_S3_ENDPOINT).rstrip("/")
    return open_s3(
        url.text, url.name, url.root, endpoint=f"{endpoint}/{url.owner}", access_key_id=key_id,
        secret_access_key=secret, region=_S3_REGION,
    )  # fmt: skip
