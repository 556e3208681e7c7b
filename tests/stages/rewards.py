"""A reward that an untrained model earns unequally, so that a few GRPO steps move the weights."""

from __future__ import annotations

from typing import Any


def share_of_even_bytes(completions: list[str], **_: Any) -> list[float]:
    return [sum(byte % 2 == 0 for byte in text.encode()) / 8 for text in completions]
