"""The body of POST /weightline/rollouts: samples of many prompts for a trainer, computed on one version."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from weightline.errors import InputError
from weightline.serving.engines.base import Generation, GenerationRequest
from weightline.serving.http.openai import (
    MAX_SAMPLES,
    MAX_SAMPLES_OF_REQUEST,
    Body,
    Seed,
    Text,
    TokenIds,
    require_few_samples,
    seeds_from,
)


class RolloutRequest(Body):
    """Prompts as token ids, and the sampling of `n` samples of each.

    `seed` is the first prompt's; each further prompt has the next number. A list names a seed a prompt, so that a
    prompt can be sampled again by itself. On one version, a seed gives the same samples again.
    """

    prompts: Annotated[tuple[TokenIds, ...], Field(min_length=1, max_length=MAX_SAMPLES_OF_REQUEST)]
    n: int = Field(default=1, ge=1, le=MAX_SAMPLES)
    max_tokens: int = Field(ge=1)
    temperature: float = Field(default=1.0, ge=0, le=100)
    top_p: float = Field(default=1.0, gt=0, le=1)
    stop: tuple[Text, ...] = ()
    seed: Seed | tuple[Seed, ...] | None = None

    def to_generation(self) -> GenerationRequest:
        """Returns the request in the form that engines take. InputError for too many samples, or too few seeds."""
        require_few_samples(len(self.prompts), self.n)
        seeds = seeds_from(self.seed, len(self.prompts)) if isinstance(self.seed, int) else self.seed
        if seeds is not None and len(seeds) != len(self.prompts):
            raise InputError(f"seed lists {len(seeds)} seeds for {len(self.prompts)} prompts", field="seed")
        return GenerationRequest(
            prompts=self.prompts,
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            stop=tuple(one for one in self.stop if one),
            seeds=seeds,
            num_samples=self.n,
            num_top_logprobs=0,
            is_text_wanted=bool(self.stop),
        )

    def answer(self, generation: Generation) -> dict[str, Any]:
        """Returns the body of an answer: the version, and for each prompt its samples."""
        samples = [
            {"token_ids": one.token_ids, "logprobs": one.logprobs, "finish_reason": one.finish_reason}
            for one in generation.completions
        ]
        groups = [samples[first : first + self.n] for first in range(0, len(samples), self.n)]
        return {"version": generation.version, "samples": groups}
