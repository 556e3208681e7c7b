"""How completions are drawn."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace

from weightline.errors import InputError


@dataclass(frozen=True, slots=True)
class Sampling:
    """The way in which the tokens of every sample are drawn. InputError for a value out of its range."""

    n: int = 1
    """Samples of one prompt: the size of its group."""
    max_tokens: int = 16
    """Tokens of a completion, at the most."""
    temperature: float = 1.0
    """0 draws the likeliest token."""
    top_p: float = 1.0
    top_k: int = 0
    """0 draws from all tokens."""
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end a completion, besides the model's own end token. The completion keeps the one it ends with."""

    def __post_init__(self) -> None:
        for name in ("n", "max_tokens"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}: name 1 or more", field=name)
        if not (math.isfinite(self.temperature) and 0 <= self.temperature <= 100):
            raise InputError(f"temperature is {self.temperature:g}: name 0 to 100", field="temperature")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p is {self.top_p:g}: name a number above 0, up to 1", field="top_p")
        if self.top_k < 0:
            raise InputError(f"top_k is {self.top_k}: name 0 (all tokens) or more", field="top_k")
        if not 0 <= self.min_p <= 1:
            raise InputError(f"min_p is {self.min_p:g}: name 0 to 1", field="min_p")
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            raise InputError(
                f"repetition_penalty is {self.repetition_penalty:g}: name a number above 0", field="repetition_penalty"
            )

    @property
    def needs_processed_logprobs(self) -> bool:
        """Whether logprobs before temperature and the like would be those of another distribution."""
        return self != Sampling(self.n, self.max_tokens, stop_token_ids=self.stop_token_ids)

    def of_group(self, n: int) -> Sampling:
        """Returns the same sampling for a group of another size."""
        return self if n == self.n else replace(self, n=n)


def seed_of(*parts: int | str) -> int:
    """Returns a seed below 2^63 that depends on all parts: (seed of the run, rank, batch, group, attempt)."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
