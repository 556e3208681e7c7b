"""Which of a vLLM server's routes are open to whoever reaches it. Everything else needs the replica's token."""

from __future__ import annotations

from enum import Enum, auto


class Route(Enum):
    """How a request is let in."""

    OPEN = auto()
    """Tells of the server; no weights take part."""
    INFERENCE = auto()
    """Answered by the weights: passes the barrier, and carries their version."""
    OURS = auto()
    """Answered by the replica's own app."""
    CONTROL = auto()
    """Looks at the server or steers it, and generates nothing: needs the token, and never waits."""
    GUARDED = auto()
    """Anything else, also what a later vLLM adds: needs the token, passes the barrier, carries the version."""


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
#: Asked before a browser sends a request to one of these.
_PREFLIGHT = frozenset(("OPTIONS", path) for _, path in _OPEN | _INFERENCE)
#: Whoever steers the engine must not wait for it.
_CONTROL = frozenset(
    ("POST", path)
    for path in (
        "/pause", "/resume", "/sleep", "/wake_up", "/abort_requests", "/inference/v1/abort_requests",
        "/collective_rpc", "/reset_prefix_cache", "/reset_mm_cache", "/reset_encoder_cache",
        "/release_kv_cache_memory", "/init_weight_transfer_engine", "/shutdown_weight_transfer_engine",
        "/start_weight_update", "/start_draft_weight_update", "/update_weights", "/finish_weight_update",
        "/update_weight_version", "/weight_checker", "/start_profile", "/stop_profile",
    )
)  # fmt: skip
_LOOKS = frozenset({"GET", "HEAD", "OPTIONS"})
_OURS = "/weightline/"
#: The replica's own route, by the path under which it is reached here: vLLM has a /metrics of its own.
RENAMED = {"/weightline/metrics": "/metrics", "/ready": "/ready"}


def classify(method: str, path: str) -> Route:
    """The class of a request. Paths are compared as they are: a variant of one is guarded."""
    if path.startswith(_OURS) or path in RENAMED:
        return Route.OURS
    if (method, path) in _INFERENCE:
        return Route.INFERENCE
    if (method, path) in _OPEN or (method, path) in _PREFLIGHT:
        return Route.OPEN
    return Route.CONTROL if method in _LOOKS or (method, path) in _CONTROL else Route.GUARDED
