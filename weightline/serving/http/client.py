"""The HTTP client of a replica, which rollouts use. Imports no torch."""

from __future__ import annotations

import json
import ssl
import time
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import httpx
from pydantic import BaseModel, ValidationError

from weightline.errors import ApplyError
from weightline.serving.http.errors import error_of
from weightline.serving.replica.status import RefreshFacts, ReplicaStatus, ServedVersion

Body = TypeVar("Body", bound=BaseModel)


def refresh(
    url: str,
    token: str,
    version: int | None = None,
    *,
    chain: str | None = None,
    allow_backward: bool = False,
    timeout_seconds: float = 600.0,
    http: httpx.Client | None = None,
) -> RefreshFacts:
    """Moves the replica at `url` to the version (None: the tip) and waits until it serves it. Safe to repeat.

    The facts name the version that is served now, which is later than `version` when the replica served a later one and
    `allow_backward` is False. A `chain` that is not the replica's is refused. Raises the replica's error as its own
    type: VersionNotFoundError, BaseMismatchError, DigestMismatchError, ...; InputError for a wrong token; ApplyError
    when it cannot move, or, with the fact `is_unreachable`, when it does not answer. `http` keeps its connections.
    """
    body = {"chain": chain, "version": version, "allow_backward": allow_backward}
    headers = {"authorization": f"Bearer {token}"}
    return _parsed(RefreshFacts, url, _ask("POST", url, "/weightline/refresh", timeout_seconds, body, headers, http))


def status(url: str, *, timeout_seconds: float = 10.0) -> ReplicaStatus:
    """Returns the status of the replica at `url`. ApplyError when it cannot be reached."""
    return _parsed(ReplicaStatus, url, _ask("GET", url, "/weightline/status", timeout_seconds))


def wait_for_version(url: str, version: int, wait_seconds: float = 0.0) -> ServedVersion:
    """Returns what the replica at `url` serves, once that is the version or a newer one, or when the time is over.

    The caller compares. One request, at most 600 s. ApplyError when the replica cannot be reached.
    """
    route = f"/weightline/version?min={version}&wait={wait_seconds:g}"
    return _parsed(ServedVersion, url, _ask("GET", url, route, wait_seconds + 10.0))


def backoff_seconds(num_failures: int, first: float, longest: float) -> float:
    """Returns the pause after so many failures in a row, at least one: twice as long after each, up to the longest."""
    return min(first * 2 ** min(num_failures - 1, 16), longest)


def read_address(state_dir: Path) -> str | None:
    """Returns the URL that a running replica has written to its state folder on this machine, or None."""
    try:
        return str(json.loads((state_dir / "address.json").read_text())["url"])
    except (OSError, ValueError, KeyError):
        return None


def wait_for_address(state_dir: Path, limit_seconds: float) -> str:
    """Returns the URL of a replica that starts on this machine, as soon as it has one. ApplyError after the limit."""
    deadline = time.monotonic() + limit_seconds
    while (url := read_address(state_dir)) is None:
        if time.monotonic() > deadline:
            raise ApplyError(f"no replica has started with the state folder {state_dir}", is_unreachable=True)
        time.sleep(0.1)
    return url


def _parsed(cls: type[Body], url: str, body: object) -> Body:
    """Parses an answer. ApplyError when it is not a replica's, as when another server listens at a former address."""
    try:
        return cls.model_validate(body)
    except ValidationError as error:
        raise ApplyError(f"the server at {url} is not a replica", url=url, is_unreachable=True) from error


@cache
def _tls() -> ssl.SSLContext:
    """Returns the trusted authorities, read once: reading them takes longer than a refresh."""
    return httpx.create_ssl_context(trust_env=False)


def _ask(
    method: str,
    url: str,
    route: str,
    timeout_seconds: float,
    body: dict[str, Any] | None = None,
    headers: dict[str, str] | None = None,
    http: httpx.Client | None = None,
) -> object:
    address = f"{url.rstrip('/')}{route}"
    try:
        with nullcontext(http) if http is not None else httpx.Client(trust_env=False, verify=_tls()) as connections:
            answer = connections.request(method, address, json=body, headers=headers, timeout=timeout_seconds)
        received: object = answer.json()
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        reason = str(error) or type(error).__name__
        raise ApplyError(
            f"the replica at {url} does not answer ({reason}): check that it runs", url=url, is_unreachable=True
        ) from error
    if answer.is_success:
        return received
    raise error_of(received, f"{address} answered {answer.status_code}")
