"""Which of a vLLM server's routes are open to whoever reaches it. Everything else needs the replica's token."""

from __future__ import annotations

from enum import Enum, auto


class Route(Enum):
    """How a request is let in."""

    OPEN = auto()
    """Tells of the server; no weights take part."""
    INFERENCE = auto()
    """Answered by the weights: passes the gate, and carries their version."""
    OURS = auto()
    """Answered by the replica's own door."""
    GUARDED = auto()
    """Anything else, also what a later vLLM adds: needs the token."""


_OPEN = frozenset(
    ("GET", path) for path in ("/health", "/load", "/metrics", "/ping", "/v1/models", "/version")
) | frozenset(("POST", path) for path in ("/tokenize", "/detokenize"))
_INFERENCE = frozenset(
    ("POST", path)
    for path in (
        "/v1/completions", "/v1/chat/completions", "/v1/messages", "/v1/embeddings", "/v1/responses",
        "/v1/audio/transcriptions", "/v1/audio/translations", "/inference/v1/generate", "/classify", "/pooling",
        "/score", "/v1/score", "/rerank", "/v1/rerank", "/v2/rerank",
    )
)  # fmt: skip
_OURS = "/weightline/"
#: The door's own route, by the path under which it is reached here: vLLM has a /metrics of its own.
RENAMED = {"/weightline/metrics": "/metrics", "/ready": "/ready"}


def classify(method: str, path: str) -> Route:
    """The class of a request. Paths are compared as they are: a variant of one is guarded."""
    if path.startswith(_OURS) or path in RENAMED:
        return Route.OURS
    if (method, path) in _INFERENCE:
        return Route.INFERENCE
    return Route.OPEN if (method, path) in _OPEN else Route.GUARDED
