"""Translates the text of obstore's errors into the project's errors. Pure."""

from __future__ import annotations

import re

from weightline.errors import NotFoundError, StorageError, TransientStorageError, WeightlineError

_STATUS = re.compile(r"non-2xx status code: (\d{3})")
_TRANSIENT_STATUS = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 507, 509, 520, 522, 524, 529})
#: Codes of replies with status 400 that are transient: the body arrived too slowly.
_TRANSIENT_CODES = ("<Code>RequestTimeout</Code>",)
#: Parts of messages about a request that got no complete answer: refused, reset, interrupted, timed out.
_CUT = ("HTTP error", "error sending request", "error decoding response body", "timed out", "connection closed")
#: Addresses of the metadata services that clients query for an instance's role without credentials in the environment.
_METADATA = (
    "169.254.169.254", "169.254.170.2", "fd00:ec2::254", "metadata.google.internal", "/latest/api/token",
    "metadata/identity",
)  # fmt: skip
_NO_BUCKET = ("NoSuchBucket", "ContainerNotFound", "The specified bucket does not exist")


def translated(
    message: str, url: str, key: str, *, is_refused: bool = False, is_missing: bool = False
) -> WeightlineError:
    """Returns the project's error for a message of the client.

    `is_refused` and `is_missing` hold what the type of the client's error already says.
    """
    what = _reason(message)
    match = _STATUS.search(message)
    status = int(match[1]) if match else None
    if any(name in message for name in _NO_BUCKET):
        return StorageError(f"{url}: there is no such bucket. Create it, or correct the URL", url=url, key=key)
    if any(place in message for place in _METADATA):
        return StorageError(
            f"{url}: there are no credentials in the environment, and no instance role. docs/buckets.md lists the "
            f"places that are searched ({what})",
            url=url, key=key,
        )  # fmt: skip
    if is_missing:
        return NotFoundError(f"no object {key} in {url}", key=key)
    if is_refused or status in (401, 403):
        return StorageError(
            f"{url} refused access to {key or 'the bucket'} ({what}). Check that the credentials are those of the "
            "bucket and may get, put, list and delete objects",
            url=url, key=key,
        )  # fmt: skip
    if status in (301, 307) or "redirect" in what:
        return StorageError(
            f"{url}: the bucket is in another region ({what}). Set AWS_REGION to its region", url=url, key=key
        )
    cls = TransientStorageError if _is_transient(message, status) else StorageError
    return cls(f"{url}: {what} at {key or 'the bucket'}", url=url, key=key)


def _is_transient(message: str, status: int | None) -> bool:
    if status is None:
        return any(text in message for text in _CUT)
    return status in _TRANSIENT_STATUS or any(code in message for code in _TRANSIENT_CODES)


def _reason(message: str) -> str:
    """Returns the message without the client's debugging text, cut to 300 characters."""
    lines = [line.strip() for line in message.partition("Debug source")[0].splitlines()]
    text = " ".join(line for line in lines if line)
    code, detail = re.search(r"<Code>([^<]*)", text), re.search(r"<Message>([^<]*)", text)
    if code:
        return f"{code[1]}: {detail[1]}" if detail else code[1]
    return text[:300]
