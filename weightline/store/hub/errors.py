"""Translates the errors of the Hub's clients into the project's own errors with a remedy.

`huggingface_hub` raises HTTP errors that carry the response. `hf_xet` raises builtin OSErrors whose text names the
status, for its token as well as for the content store.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager

import hf_xet
from huggingface_hub.errors import (
    BucketNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    OfflineModeIsEnabled,
)

from weightline.errors import InputError, NotFoundError, StorageError, TransientStorageError, WeightlineError

_TRANSIENT_STATUS = frozenset({408, 409, 425, 429, 500, 502, 503, 504})

_STATUS_IN_TEXT = re.compile(r"HTTP status (?:client|server) error \((\d{3})\b")

#: Parts of hf_xet's messages about a request that got no answer or was interrupted.
_CUT_IN_TEXT = re.compile(r"network error|request|connection|timed? ?out|decoding response body|reset", re.IGNORECASE)


@contextmanager
def hub_errors(url: str, key: str = "") -> Iterator[None]:
    """Translates errors of the Hub's clients that the block raises.

    NotFoundError for a missing bucket or file; InputError for an invalid name; StorageError or TransientStorageError
    for all others.
    """
    try:
        yield
    except HfHubHTTPError as error:
        raise _of_status(error.response.status_code, url, key, str(error)) from error
    except OfflineModeIsEnabled as error:
        raise StorageError(f"{url}: HF_HUB_OFFLINE is set; unset it to use the Hub", url=url, key=key) from error
    except HFValidationError as error:
        raise InputError(f"{url}: {error}", url=url) from error
    except HTTPError as error:
        raise TransientStorageError(f"{url}: no answer from the Hub ({error})", url=url, key=key) from error
    except json.JSONDecodeError as error:
        raise StorageError(
            f"{url}: the reply does not come from a Hub. Check HF_ENDPOINT, and that no proxy answers in its place",
            url=url,
            key=key,
        ) from error
    except hf_xet.XetObjectNotFoundError as error:
        raise StorageError(f"{url}: the content of {key} is gone from the Hub", url=url, key=key) from error
    except hf_xet.XetAuthenticationError as error:
        raise _of_status(401, url, key, str(error)) from error
    except (OSError, RuntimeError) as error:
        raise _of_text(error, url, key) from error


def is_missing_bucket(error: WeightlineError) -> bool:
    """Returns whether the bucket itself is missing, or hidden from this token."""
    return isinstance(error.__cause__, BucketNotFoundError)


def _of_status(status: int, url: str, key: str, text: str) -> WeightlineError:
    reason = " ".join(text.split())[:300]
    if status == 401:
        return StorageError(
            f"{url}: the Hub does not accept the token. Log in with `hf auth login`, or set HF_TOKEN ({reason})",
            url=url, key=key, status=status,
        )  # fmt: skip
    if status == 403:
        return StorageError(
            f"{url}: the token lacks a permission. Use one with write permission for the bucket's owner ({reason})",
            url=url, key=key, status=status,
        )  # fmt: skip
    if status == 404:
        what = f"no object {key} in {url}" if key else f"{url}: no such bucket, or this token cannot see it"
        return NotFoundError(what, key=key, url=url)
    cls = TransientStorageError if status in _TRANSIENT_STATUS else StorageError
    return cls(f"{url}: the Hub answered {status} ({reason})", url=url, key=key, status=status)


def _of_text(error: OSError | RuntimeError, url: str, key: str) -> WeightlineError:
    found = _STATUS_IN_TEXT.search(str(error))
    if found:
        return _of_status(int(found[1]), url, key, str(error))
    if isinstance(error, OSError) and error.errno is not None:
        return StorageError(f"{url}: {error.strerror} at {key} on this host", url=url, key=key)
    is_cut = isinstance(error, ConnectionError | TimeoutError) or _CUT_IN_TEXT.search(str(error))
    cls = TransientStorageError if is_cut else StorageError
    return cls(f"{url}: the Hub's content store: {' '.join(str(error).split())[:300]}", url=url, key=key)
