"""What the door accepts and answers: OpenAI's completions, as far as they make sense here, and the refresh."""

from __future__ import annotations

import time
import uuid
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from weightline.serving.engines.base import Generation, GenerationRequest, Prompt

VERSION_HEADER = "x-weightline-version"

# Strict numbers: else the prompts "1" and "2" would be read as tokens 1 and 2.
TokenIds = tuple[Annotated[int, Field(ge=0, strict=True)], ...]

T = TypeVar("T")


def _writable(text: str) -> str:
    """JSON can spell half of a surrogate pair (`"\\ud800"`), which no UTF-8, and so no tokenizer, can hold."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("half of a surrogate pair is no character") from error
    return text


Text = Annotated[str, AfterValidator(_writable)]
Batch = Annotated[tuple[T, ...], Field(min_length=1, max_length=256)]


class _Body(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class CompletionRequest(_Body):
    """POST /v1/completions. https://platform.openai.com/docs/api-reference/completions/create

    A field that is not here is refused by name rather than ignored; those with one possible value are here to say so.
    """

    prompt: Text | TokenIds | Batch[Text] | Batch[TokenIds]
    model: Text | None = None
    max_tokens: int = Field(default=16, ge=1)
    temperature: float = Field(default=1.0, ge=0, le=100)
    top_p: float = Field(default=1.0, gt=0, le=1)
    stop: Text | tuple[Text, ...] | None = None
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    n: Literal[1] = 1
    stream: Literal[False] = False
    echo: Literal[False] = False
    logprobs: None = None
    user: Text | None = None

    def to_generation(self) -> GenerationRequest:
        """The request as engines know it."""
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop or ()
        return GenerationRequest(
            prompts=_prompts_of(self.prompt),
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            stop=tuple(one for one in stop if one),
            seed=self.seed,
        )


def _prompts_of(prompt: str | tuple[int, ...] | tuple[str, ...] | tuple[tuple[int, ...], ...]) -> tuple[Prompt, ...]:
    """One prompt or many: a tuple of numbers is one."""
    if isinstance(prompt, str):
        return (prompt,)
    tokens = tuple(part for part in prompt if isinstance(part, int))
    return (tokens,) if len(tokens) == len(prompt) else tuple(part for part in prompt if not isinstance(part, int))


class RefreshRequest(_Body):
    """POST /weightline/refresh. `version` null: the tip. An earlier version needs `allow_backward`.

    `chain`: the bucket that the caller means; another one than the replica's is refused.
    """

    chain: Text | None = None
    version: Annotated[int, Field(ge=0)] | None = None
    allow_backward: bool = False


def completion_body(generation: Generation, model: str) -> dict[str, Any]:
    """OpenAI's answer, and which version of the weights gave it."""
    completion_tokens = sum(one.num_tokens for one in generation.completions)
    return {
        "id": f"cmpl-{uuid.uuid4().hex}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": model,
        "choices": [
            {"index": index, "text": one.text, "finish_reason": one.finish_reason, "logprobs": None}
            for index, one in enumerate(generation.completions)
        ],
        "usage": {
            "prompt_tokens": generation.num_prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": generation.num_prompt_tokens + completion_tokens,
        },
        "weightline_version": generation.version,
    }
