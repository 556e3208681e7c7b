"""Which replicas of a chain can be moved from here, and the token of each.

A lease in the bucket says where a replica answers, but not that it is ours: a token is only sent to hosts that were
allowed here (WEIGHTLINE_REPLICA_HOSTS; without it, this machine), over URLs that the operator or the stack gave.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from urllib.parse import urlsplit

from weightline.chain import Chain
from weightline.chain.read.leases import Lease, live_leases
from weightline.errors import ApplyError, InputError
from weightline.fleet.local_replica import ensure_replica, replicas_dir
from weightline.fleet.waves import Member
from weightline.serving.http import client
from weightline.serving.http.auth import TOKEN_VARIABLE, is_loopback
from weightline.serving.replica.following import TIP
from weightline.serving.replica.status import ReplicaStatus

#: URLs of replicas that somebody else runs, separated by spaces or commas; their token is in WEIGHTLINE_TOKEN.
SERVING_URL_VARIABLE = "WEIGHTLINE_SERVING_URL"
#: Hosts of replicas, found by their leases, that may be sent the token: names with wildcards, by spaces or commas.
REPLICA_HOSTS_VARIABLE = "WEIGHTLINE_REPLICA_HOSTS"
_LOOK_SECONDS = 10.0
_LOOKS_AT_ONCE = 16


@dataclass(frozen=True, slots=True)
class ReachableReplica:
    """A replica that answered just now."""

    name: str
    url: str
    version: int | None
    token: str = field(repr=False)

    @property
    def member(self) -> Member:
        return Member(self.name, self.version)


@dataclass(frozen=True, slots=True)
class Fleet:
    """`reached`: to be moved. `others`: names of live replicas that follow by themselves, or are not to be asked.

    `ungated`: those of the others that follow the chain's tip, and so serve every version before anybody judged it.
    """

    reached: tuple[ReachableReplica, ...]
    others: tuple[str, ...]
    ungated: tuple[str, ...] = ()


def find_fleet(chain: Chain) -> Fleet:
    """Everybody who serves the chain: those of WEIGHTLINE_SERVING_URL, the local stack's, and those with a lease.

    InputError when nobody is known at all; ApplyError when nobody answers, or when a replica that was named follows
    another chain. Starts the local stack's replica where it is not running. One that follows by itself is not moved,
    however it is known: it would go back to what it follows.
    """
    leases = live_leases(chain)
    addresses = dict(_named(chain))
    is_somebody_known = bool(addresses or leases)
    for lease in leases:
        if lease.follows is None and may_receive_token(lease):
            addresses.setdefault(str(lease.url), os.environ[TOKEN_VARIABLE])
    told, errors = _look(chain, addresses)
    reached = tuple(one for one, follows in told if follows is None)
    followers: dict[str, str | None] = {one.name: follows for one, follows in told if follows is not None}
    names = {one.name for one in reached}
    followers |= {lease.replica: lease.follows for lease in leases if lease.replica not in names}
    if not is_somebody_known:
        raise InputError(
            f"no replica is known: set {SERVING_URL_VARIABLE} and {TOKEN_VARIABLE}, or start a stack (weightline up)",
            field=SERVING_URL_VARIABLE,
        )
    if errors and not reached and not followers:
        raise errors[0]
    return Fleet(reached, tuple(followers), tuple(name for name, follows in followers.items() if follows == TIP))


def may_receive_token(lease: Lease) -> bool:
    """Whether the token may be sent where a lease says that its replica is: whoever writes to the bucket can say so."""
    host = urlsplit(lease.url or "").hostname
    if host is None or not os.environ.get(TOKEN_VARIABLE):
        return False
    patterns = _split(os.environ.get(REPLICA_HOSTS_VARIABLE, ""))
    return any(fnmatchcase(host, pattern) for pattern in patterns) if patterns else is_loopback(host)


def _named(chain: Chain) -> Iterator[tuple[str, str]]:
    """URL and token of those that the operator or the stack knows."""
    urls = _split(os.environ.get(SERVING_URL_VARIABLE, ""))
    yield from ((url, os.environ.get(TOKEN_VARIABLE, "")) for url in urls)
    folder = replicas_dir()
    if folder is not None and not urls:
        address = ensure_replica(chain.url, folder)
        yield address.url, address.token


def _look(
    chain: Chain, addresses: dict[str, str]
) -> tuple[list[tuple[ReachableReplica, str | None]], list[ApplyError]]:
    """Ask everybody; who answered, with what it follows. One name is one replica, however many URLs lead to it."""
    found: dict[str, tuple[ReachableReplica, str | None]] = {}
    errors: list[ApplyError] = []
    with ThreadPoolExecutor(max_workers=_LOOKS_AT_ONCE) as pool:
        for (url, token), told in zip(addresses.items(), pool.map(_status_or_error, addresses), strict=True):
            if isinstance(told, ApplyError):
                errors.append(told)
            elif not is_same_chain(told.chain, chain.url):
                errors.append(ApplyError(f"the replica at {url} follows {told.chain}, not {chain.url}", url=url))
            else:
                replica = ReachableReplica(told.replica, url, told.version, token)
                found.setdefault(told.replica, (replica, told.follows))
    return list(found.values()), errors


def _status_or_error(url: str) -> ReplicaStatus | ApplyError:
    try:
        return client.status(url, timeout_seconds=_LOOK_SECONDS)
    except ApplyError as error:
        return error


def is_same_chain(followed: str, wanted: str) -> bool:
    """Whether two URLs name one bucket prefix."""
    return followed.rstrip("/") == wanted.rstrip("/")


def _split(text: str) -> list[str]:
    return text.replace(",", " ").split()
