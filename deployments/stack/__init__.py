"""Starts and ends a Prefect server, worker, dashboard and replica together on one machine."""

from enum import StrEnum

DEFAULT_PORT = 4200


class Engine(StrEnum):
    """What serves the chain that a stack trained last."""

    EMBEDDED = "embedded"
    VLLM = "vllm"
