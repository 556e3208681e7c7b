"""The names that a replica's server and its clients share: headers, routes, and how long a connection may be idle."""

from __future__ import annotations

#: In an answer: the version that wrote it. In a request: exactly this version answers.
VERSION_HEADER = "x-weightline-version"
MIN_VERSION_HEADER = "x-weightline-min-version"
WAIT_HEADER = "x-weightline-wait-seconds"
MIXING_HEADER = "x-weightline-mixing"

ROLLOUTS_ROUTE = "/weightline/rollouts"
COMPLETIONS_ROUTE = "/v1/completions"
#: vLLM's. Of the answers of its own routes, only this one's name the version of each token.
GENERATE_ROUTE = "/inference/v1/generate"

#: Less than the 5 s after which uvicorn closes an idle connection, so that none is used while it closes.
KEEPALIVE_SECONDS = 2.0
