"""Errors over HTTP: OpenAI's shape, our codes and facts, and back into our own types on the client's side."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from weightline.errors import ApplyError, InputError, WeightlineError

UNAUTHORIZED = "unauthorized"


def error_body(message: str, code: str, facts: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The JSON object of every refusal."""
    readable = json.loads(json.dumps(facts or {}, default=str))
    return {"error": {"message": message, "type": code, "code": code, "facts": readable}}


def error_of(body: object, fallback: str) -> WeightlineError:
    """The error that a body tells of; an ApplyError with the fallback text for anything that is no such body."""
    told = body.get("error") if isinstance(body, dict) else None
    if not isinstance(told, dict):
        return ApplyError(fallback)
    facts = told.get("facts")
    message = str(told.get("message", fallback))
    if told.get("code") == UNAUTHORIZED:
        return InputError(message, field="token")
    cls = _BY_KIND.get(str(told.get("code")), ApplyError)
    return cls(message, **(facts if isinstance(facts, dict) else {}))


def _leaves(cls: type[WeightlineError]) -> Iterator[type[WeightlineError]]:
    for child in cls.__subclasses__():
        yield child
        yield from _leaves(child)


_BY_KIND: dict[str, type[WeightlineError]] = {str(cls.kind): cls for cls in _leaves(WeightlineError)}
