"""Checks that only Hub buckets need, for check_bucket.py, with raw requests that weightline does not retry or sort."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Sequence
from urllib.parse import quote

from huggingface_hub import BucketFile, HfApi
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

from weightline.errors import StorageError
from weightline.store.hub.errors import hub_errors
from weightline.store.hub.store import DEFAULT_ENDPOINT, HubUrl, open_hub, parse_hub_url

#: More files than a page is known to hold.
_NUM_FILES = 1001
_NUM_GATEWAY_PUTS = 5
#: weightline waits at most this long until the API shows a file that the gateway accepted.
_GATEWAY_SECONDS = 12.0
_LISTED_SECONDS = 30.0


class RawHub:
    """Accesses a prefix of a Hub bucket with the client's own calls."""

    def __init__(self, url: str) -> None:
        self.url: HubUrl = parse_hub_url(url)
        self.endpoint = (os.environ.get("HF_ENDPOINT") or DEFAULT_ENDPOINT).rstrip("/")
        self.api = HfApi(endpoint=self.endpoint)

    def path(self, key: str) -> str:
        return f"{self.url.root}{key}"

    def sees(self, path: str) -> bool:
        with hub_errors(self.url.text):
            return bool(list(self.api.get_bucket_paths_info(self.url.bucket_id, [path])))

    def listed(self, folder: str) -> list[str]:
        with hub_errors(self.url.text):
            entries = self.api.list_bucket_tree(self.url.bucket_id, folder, recursive=True)
            return [entry.path for entry in entries if isinstance(entry, BucketFile)]

    def batch(self, *, add: Sequence[str] = (), delete: Sequence[str] = ()) -> None:
        """Adds files of one byte and deletes files, in one batch call."""
        with hub_errors(self.url.text):
            self.api.batch_bucket_files(
                self.url.bucket_id, add=[(b"x", path) for path in add] or None, delete=list(delete) or None
            )

    def first_page(self, folder: str) -> list[str]:
        """Returns the paths of one listing request, in the Hub's order and number."""
        with hub_errors(self.url.text):
            response = get_session().get(
                f"{self.endpoint}/api/buckets/{self.url.bucket_id}/tree/{quote(folder, safe='')}",
                params={"recursive": True}, headers=build_hf_headers(),
            )  # fmt: skip
            hf_raise_for_status(response)
        return [item["path"] for item in response.json() if item["type"] == "file"]


def gateway_lag(url: str) -> str:
    """Measures the time until the API shows files that the S3 gateway accepted."""
    hub, gateway = RawHub(url), open_hub(url)._gateway
    if gateway is None:
        return "not checked: no keys of the S3 gateway are set"
    longest = 0.0
    for _ in range(_NUM_GATEWAY_PUTS):
        key = f"gateway/{uuid.uuid4().hex}"
        gateway.put_if_absent(key, b"x")
        begun = time.monotonic()
        while not hub.sees(hub.path(key)):
            if time.monotonic() - begun > _GATEWAY_SECONDS:
                raise StorageError(f"{key} does not show in the API {_GATEWAY_SECONDS:.0f} s after the gateway took it")
            time.sleep(0.1)
        longest = max(longest, time.monotonic() - begun)
        gateway.delete(key)
    return f"{_NUM_GATEWAY_PUTS} puts, shown after {longest:.1f} s at most"


def pages_of_listings(url: str) -> str:
    """Adds more files than a page holds in one batch, and checks and times the listing of all of them."""
    hub, folder = RawHub(url), f"pages-{uuid.uuid4().hex[:8]}"
    paths = [hub.path(f"{folder}/{number:04}") for number in range(_NUM_FILES)]
    begun = time.monotonic()
    hub.batch(add=paths[::-1])
    added = time.monotonic()
    try:
        listed = hub.listed(hub.path(folder))
        while sorted(listed) != paths and time.monotonic() - added < _LISTED_SECONDS:
            time.sleep(0.5)
            listed = hub.listed(hub.path(folder))
        seconds = time.monotonic() - added
        page = hub.first_page(hub.path(folder))
    finally:
        hub.batch(delete=paths)
    if sorted(listed) != paths:
        raise StorageError(f"{len(set(listed))} of {_NUM_FILES} files are listed after {_LISTED_SECONDS:.0f} s")
    order = "in key order" if listed == paths else "in no order (weightline sorts)"
    return f"{_NUM_FILES} files up in {added - begun:.1f} s, listed after {seconds:.1f} s, {len(page)} a page, {order}"
