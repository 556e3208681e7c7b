"""Which replica should answer a request, so that requests that begin alike meet the same cached prefix. Pure functions.

Every request has a key, and every key ranks the replicas by rendezvous hashing: the first of the ranking is the key's
home. A replica that joins or leaves changes the home of its own keys only, a second front ranks alike, and a restart
forgets nothing. A replica that has more than its share of the requests under way is passed over (bounded load), so a
prefix that all requests share does not overload its home.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

#: Orders the names of replicas for a key.
Ranking = Callable[[str, Iterable[str]], list[str]]
#: A client names its own key with this header, such as the id of a conversation or of an episode.
AFFINITY_HEADER = "x-weightline-affinity"
#: How much of a prompt makes the key: prompts that agree so far share their cached prefix.
PREFIX_CHARACTERS = 1024
PREFIX_TOKENS = 256
#: A replica takes at most so many times the mean of the requests under way.
LOAD_FACTOR = 1.25


def key_of(body: object, named: str | None = None) -> str:
    """Returns the key of a request: the named one, else the beginning of its first prompt.

    A chat's key is everything up to its first message of the user, which all turns of a conversation share. A body in
    which no prompt is found has the empty key, so all such requests share a home.
    """
    if named:
        return f"named:{named}"
    if not isinstance(body, dict):
        return ""
    messages = body.get("messages")
    if isinstance(messages, list):
        return "chat:" + "\n".join(_beginning_of_chat(messages))[: 8 * PREFIX_CHARACTERS]
    return _beginning_of_prompt(_first_prompt(body))


def _first_prompt(body: Mapping[str, Any]) -> object:
    """Returns the first prompt of a body of /v1/completions, /inference/v1/generate or /weightline/rollouts."""
    given = next((body[name] for name in ("prompt", "token_ids", "prompts") if body.get(name)), None)
    if isinstance(given, list) and given and isinstance(given[0], list | str):
        return given[0]
    return given


def _beginning_of_prompt(prompt: object) -> str:
    if isinstance(prompt, str):
        return f"text:{prompt[:PREFIX_CHARACTERS]}"
    if isinstance(prompt, list):
        return f"tokens:{prompt[:PREFIX_TOKENS]}"
    return ""


def _beginning_of_chat(messages: Sequence[object]) -> Iterable[str]:
    for message in messages:
        yield str(message)[:PREFIX_CHARACTERS]
        if isinstance(message, dict) and message.get("role") == "user":
            return


def ranked(key: str, names: Iterable[str]) -> list[str]:
    """Returns the names in the order in which they should answer requests of the key. The first is the key's home."""
    return sorted(names, key=lambda name: _score(key, name), reverse=True)


def _score(key: str, name: str) -> bytes:
    return hashlib.blake2b(f"{name}\0{key}".encode(errors="surrogatepass"), digest_size=16).digest()


def first_with_room(names: Sequence[str], num_in_flight: Mapping[str, int]) -> str:
    """Returns the first of the ranked names that has room: at most LOAD_FACTOR times the mean, with this request."""
    total = 1 + sum(num_in_flight[name] for name in names)
    most = math.ceil(LOAD_FACTOR * total / len(names))
    return next((name for name in names if num_in_flight[name] < most), names[0])
