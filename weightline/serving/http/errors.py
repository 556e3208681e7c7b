"""Errors over HTTP: writes them in OpenAI's shape with the project's codes and facts, and parses them in the client."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from weightline.errors import ApplyError, InputError, WeightlineError

UNAUTHORIZED = "unauthorized"


def error_body(message: str, code: str, facts: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Returns the JSON object of an error."""
    readable = json.loads(json.dumps(facts or {}, default=str))
    return {"error": {"message": message, "type": code, "code": code, "facts": readable}}


def error_of(body: object, fallback: str) -> WeightlineError:
    """Returns the error of a body, as its own type; an ApplyError with the fallback text for any other body."""
    error = body.get("error") if isinstance(body, dict) else None
    if not isinstance(error, dict):
        return ApplyError(fallback)
    facts = error.get("facts")
    message = str(error.get("message", fallback))
    if error.get("code") == UNAUTHORIZED:
        return InputError(message, field="token")
    cls = _BY_KIND.get(str(error.get("code")), ApplyError)
    return cls(message, **(facts if isinstance(facts, dict) else {}))


def _leaves(cls: type[WeightlineError]) -> Iterator[type[WeightlineError]]:
    for child in cls.__subclasses__():
        yield child
        yield from _leaves(child)


_BY_KIND: dict[str, type[WeightlineError]] = {str(cls.kind): cls for cls in _leaves(WeightlineError)}
