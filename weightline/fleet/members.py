"""Finds the replicas of a chain that can be moved from here, and the token of each.

A lease in the bucket names a replica's URL, but every writer of the bucket can write one. The token is therefore sent
only to URLs that the operator or the local stack gave, and to hosts that WEIGHTLINE_REPLICA_HOSTS allows (without it,
to this machine only): see `weightline.serving.http.hosts`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from weightline.chain import Chain
from weightline.chain.read.history import is_same_chain
from weightline.chain.read.leases import live_leases
from weightline.errors import ApplyError, InputError
from weightline.fleet.local_replica import ensure_replica, replicas_dir
from weightline.fleet.waves import Member
from weightline.serving.http import client
from weightline.serving.http.auth import TOKEN_VARIABLE
from weightline.serving.http.hosts import may_receive_token
from weightline.serving.replica.following import TIP
from weightline.serving.replica.status import ReplicaStatus

#: URLs of replicas that run outside the local stack, separated by spaces or commas. Their token is WEIGHTLINE_TOKEN.
SERVING_URL_VARIABLE = "WEIGHTLINE_SERVING_URL"
_STATUS_SECONDS = 10.0
_MAX_REQUESTS_AT_ONCE = 16


@dataclass(frozen=True, slots=True)
class ReachableReplica:
    """A replica that answered a status request and can be moved."""

    name: str
    url: str
    version: int | None
    token: str = field(repr=False)

    @property
    def member(self) -> Member:
        return Member(self.name, self.version)


@dataclass(frozen=True, slots=True)
class Fleet:
    """The replicas of a chain.

    `reached` can be moved. `others` names live replicas that follow by themselves or may not receive the token.
    `ungated` names those of the others that follow the chain's tip, and so serve every version before it is judged.
    """

    reached: tuple[ReachableReplica, ...]
    others: tuple[str, ...]
    ungated: tuple[str, ...] = ()


def find_fleet(chain: Chain) -> Fleet:
    """Returns the replicas of the chain: those of WEIGHTLINE_SERVING_URL, the local stack's, and those with a lease.

    Starts the local stack's replica if it is not running. A replica that follows by itself is never moved, since it
    would return to the version that it follows. InputError when there is no replica; ApplyError when none answers, or
    when a named replica follows another chain.
    """
    leases = live_leases(chain)
    addresses = dict(_named(chain))
    is_any_known = bool(addresses or leases)
    for lease in leases:
        if lease.follows is None and may_receive_token(lease):
            addresses.setdefault(str(lease.url), os.environ[TOKEN_VARIABLE])
    answered, errors = _ask_all(chain, addresses)
    reached = tuple(one for one, follows in answered if follows is None)
    followers: dict[str, str | None] = {one.name: follows for one, follows in answered if follows is not None}
    names = {one.name for one in reached}
    followers |= {lease.replica: lease.follows for lease in leases if lease.replica not in names}
    if not is_any_known:
        raise InputError(
            f"there is no replica: set {SERVING_URL_VARIABLE} and {TOKEN_VARIABLE}, or start a stack (weightline up)",
            field=SERVING_URL_VARIABLE,
        )
    if errors and not reached and not followers:
        raise errors[0]
    return Fleet(reached, tuple(followers), tuple(name for name, follows in followers.items() if follows == TIP))


def _named(chain: Chain) -> Iterator[tuple[str, str]]:
    """Yields URL and token of the replicas that the operator or the local stack named."""
    urls = _split(os.environ.get(SERVING_URL_VARIABLE, ""))
    yield from ((url, os.environ.get(TOKEN_VARIABLE, "")) for url in urls)
    folder = replicas_dir()
    if folder is not None and not urls:
        address = ensure_replica(chain.url, folder)
        yield address.url, address.token


def _ask_all(
    chain: Chain, addresses: dict[str, str]
) -> tuple[list[tuple[ReachableReplica, str | None]], list[ApplyError]]:
    """Requests the status of all replicas at the same time.

    Returns (those that answered, each with the ref that it follows, errors of the others). Names are unique.
    """
    found: dict[str, tuple[ReachableReplica, str | None]] = {}
    errors: list[ApplyError] = []
    with ThreadPoolExecutor(max_workers=_MAX_REQUESTS_AT_ONCE) as pool:
        for (url, token), status in zip(addresses.items(), pool.map(_status_or_error, addresses), strict=True):
            if isinstance(status, ApplyError):
                errors.append(status)
            elif not is_same_chain(status.chain, chain.url):
                errors.append(ApplyError(f"the replica at {url} follows {status.chain}, not {chain.url}", url=url))
            else:
                replica = ReachableReplica(status.replica, url, status.version, token)
                found.setdefault(status.replica, (replica, status.follows))
    return list(found.values()), errors


def _status_or_error(url: str) -> ReplicaStatus | ApplyError:
    try:
        return client.status(url, timeout_seconds=_STATUS_SECONDS)
    except ApplyError as error:
        return error


def _split(text: str) -> list[str]:
    return text.replace(",", " ").split()
