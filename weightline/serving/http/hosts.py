"""Which hosts of leases are trusted, and so may receive the token: exact names or addresses, DNS suffixes, networks.

A lease in the bucket names a replica's URL, but every writer of the bucket can write one. WEIGHTLINE_REPLICA_HOSTS
lists the hosts that are trusted; without it, only this machine is. A pattern of an address never matches a name:
anybody can register `10.0.0.attacker.example`.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import urlsplit

import httpx

from weightline.chain.read.leases import Lease
from weightline.errors import InputError
from weightline.serving.http.auth import TOKEN_VARIABLE, is_loopback

#: Hosts of leased replicas that are trusted, separated by spaces or commas.
REPLICA_HOSTS_VARIABLE = "WEIGHTLINE_REPLICA_HOSTS"

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_NAME = re.compile(r"(?=.{1,253}\Z)[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?(\.[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?)*")
#: Names that end in a number are addresses to some resolvers: 10.7 and 0x0a000007 are both 10.0.0.7.
_LIKE_ADDRESS = re.compile(r"(.*\.)?(0x[0-9a-f]*|[0-9]+)")
#: An IPv4 address whose last parts are wildcards.
_STARRED = re.compile(r"[0-9]+(\.[0-9]+){0,2}(\.\*)+")


@dataclass(frozen=True, slots=True)
class HostPatterns:
    """The parsed patterns of WEIGHTLINE_REPLICA_HOSTS."""

    names: frozenset[str]
    suffixes: tuple[str, ...]
    """Each with its leading dot."""
    networks: tuple[Network, ...]

    def __bool__(self) -> bool:
        return bool(self.names or self.suffixes or self.networks)

    def match(self, host: str) -> bool:
        """Returns whether a host, as `host_of` gives it, is one of these."""
        address = _address(host)
        if address is not None:
            return any(address in network for network in self.networks)
        return host in self.names or host.endswith(self.suffixes)


def is_trusted_url(url: str | None) -> bool:
    """Returns whether the host of a leased URL is one that WEIGHTLINE_REPLICA_HOSTS allows, or else this machine.

    InputError for a pattern of WEIGHTLINE_REPLICA_HOSTS that is none.
    """
    patterns, host = trusted_patterns(), host_of(url or "")
    if host is None:
        return False
    return patterns.match(host) if patterns else is_loopback(host)


def trusted_patterns() -> HostPatterns:
    """Parses WEIGHTLINE_REPLICA_HOSTS. InputError for a pattern that is none."""
    words = os.environ.get(REPLICA_HOSTS_VARIABLE, "").replace(",", " ").split()
    return parse_patterns(words, REPLICA_HOSTS_VARIABLE)


def may_receive_token(lease: Lease) -> bool:
    """Returns whether there is a token, and it may be sent to the URL of a lease.

    InputError for a pattern of WEIGHTLINE_REPLICA_HOSTS that is none.
    """
    return is_trusted_url(lease.url) and bool(os.environ.get(TOKEN_VARIABLE))


def parse_patterns(words: Iterable[str], variable: str) -> HostPatterns:
    """Parses patterns: `gpu-7.pool.svc`, `*.pool.svc` (or `.pool.svc`), `10.0.0.7`, `10.0.0.0/24`, `[fd00::]/8`.

    `10.0.0.*` is read as the network 10.0.0.0/24. InputError for every other use of `*`.
    """
    names: set[str] = set()
    suffixes: list[str] = []
    networks: list[Network] = []
    for word in words:
        text = word.strip().lower().rstrip(".")
        suffix = text.removeprefix("*")
        if (network := _network(text)) is not None:
            networks.append(network)
        elif suffix.startswith(".") and _is_name(suffix[1:]):
            suffixes.append(suffix)
        elif _is_name(text):
            names.add(text)
        else:
            raise InputError(
                f"{variable}: {word!r} is no host. Write a name (gpu-7.pool.svc), a suffix (*.pool.svc), an address or "
                "a network (10.0.0.0/24)",
                variable=variable,
            )
    return HostPatterns(frozenset(names), tuple(suffixes), tuple(networks))


def host_of(url: str) -> str | None:
    """Returns the host of an HTTP URL in lower case: an address in its one spelling, or a DNS name.

    None for a URL that is none or that two parsers read in two ways, and for a name that a resolver might take for an
    address.
    """
    try:
        parts = urlsplit(url)
        host, asked = parts.hostname or "", httpx.URL(url).host
        _ = parts.port  # ValueError for a number that is no port
    except (ValueError, httpx.InvalidURL):
        return None
    host = host.rstrip(".").lower()
    if parts.scheme not in ("http", "https") or host != asked.rstrip(".").lower():
        return None
    address = _address(host)
    if address is not None:
        return str(address)
    return host if _is_name(host) else None


def _is_name(text: str) -> bool:
    return _NAME.fullmatch(text) is not None and _LIKE_ADDRESS.fullmatch(text) is None


def _address(text: str) -> Address | None:
    try:
        return ipaddress.ip_address(text.strip("[]"))
    except ValueError:
        return None


def _network(text: str) -> Network | None:
    if _STARRED.fullmatch(text):
        parts = text.split(".")
        if len(parts) != 4:
            return None
        known = sum(part != "*" for part in parts)
        text = f"{text.replace('*', '0')}/{8 * known}"
    address, slash, length = text.partition("/")
    try:
        return ipaddress.ip_network(f"{address.strip('[]')}{slash}{length}", strict=False)
    except ValueError:
        return None
