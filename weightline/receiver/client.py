"""Ask a replica over HTTP. Small, and free of torch: what tasks and flows use."""

from __future__ import annotations

from typing import Any

import httpx

from weightline.errors import ApplyError
from weightline.receiver.facts import RefreshFacts, ReplicaStatus
from weightline.receiver.http_errors import error_of


def refresh(
    url: str,
    token: str,
    version: int | None = None,
    *,
    allow_backward: bool = False,
    timeout_seconds: float = 600.0,
) -> RefreshFacts:
    """Move the replica at `url` to the version (None: the tip) and wait until it serves it. Safe to repeat.

    The facts name the version that is served now: a later one than asked for, when the replica was there already and
    `allow_backward` is False. Raises what the replica raised, by type: VersionNotFoundError, BaseMismatchError,
    DigestMismatchError, ...; InputError for a wrong token; ApplyError when it cannot move or cannot be reached.
    """
    body = {"version": version, "allow_backward": allow_backward}
    headers = {"authorization": f"Bearer {token}"}
    return RefreshFacts.model_validate(_ask("POST", url, "/weightline/refresh", timeout_seconds, body, headers))


def status(url: str, *, timeout_seconds: float = 10.0) -> ReplicaStatus:
    """What the replica at `url` serves. ApplyError when it cannot be reached."""
    return ReplicaStatus.model_validate(_ask("GET", url, "/weightline/status", timeout_seconds))


def _ask(
    method: str,
    url: str,
    route: str,
    timeout_seconds: float,
    body: dict[str, Any] | None = None,
    headers: dict[str, str] | None = None,
) -> object:
    where = f"{url.rstrip('/')}{route}"
    try:
        answer = httpx.request(method, where, json=body, headers=headers, timeout=timeout_seconds, trust_env=False)
        told: object = answer.json()
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        reason = str(error) or type(error).__name__
        raise ApplyError(f"the replica at {url} gives no answer ({reason}): is it running?", url=url) from error
    if answer.is_success:
        return told
    raise error_of(told, f"{where} answered {answer.status_code}")
