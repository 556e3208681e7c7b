"""`hf://buckets/<owner>/<name>/<prefix>`, parsed once."""

from __future__ import annotations

import re
from dataclasses import dataclass

from weightline.errors import InputError
from weightline.store.base import checked_key

_SCHEME = "hf://"
_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9])?")


@dataclass(frozen=True, slots=True)
class HubUrl:
    """A prefix of a Hub bucket. `root` is what stands before every key: empty, or a path with a slash at its end."""

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
    """The bucket and prefix that the URL names. InputError for any other `hf://` URL."""
    kind, *parts = url.removeprefix(_SCHEME).rstrip("/").split("/")
    if not url.startswith(_SCHEME) or kind != "buckets" or len(parts) < 2:
        raise InputError(f"{url}: a Hub bucket's URL is hf://buckets/<owner>/<name>/<prefix>", url=url)
    owner, name, *below = parts
    for part in (owner, name):
        if not _NAME.fullmatch(part):
            raise InputError(
                f"{url}: {part!r} is no name on the Hub: use letters, digits, '.', '_' and '-', up to 96", url=url
            )
    if any(character in url for character in "?#%"):
        raise InputError(f"{url}: a Hub bucket's URL has no '?', '#' or '%'", url=url)
    return HubUrl(owner, name, f"{checked_key('/'.join(below))}/" if below else "")
