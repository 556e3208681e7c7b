"""The bodies of OpenAI's completions and chat completions, as far as the embedded server takes and gives them."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag

from weightline.errors import InputError
from weightline.serving.engines.base import Conversation, Generation, GenerationRequest, Prompt

T = TypeVar("T")


def _encodable(text: str) -> str:
    """Returns the text. ValueError for a lone surrogate (`"\\ud800"` in JSON), which UTF-8 cannot encode."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("the text has a lone surrogate, which is not a character") from error
    return text


# Strict numbers, because otherwise the prompts "1" and "2" would be read as tokens 1 and 2.
TokenIds = tuple[Annotated[int, Field(ge=0, strict=True)], ...]
Text = Annotated[str, AfterValidator(_encodable)]
Batch = Annotated[tuple[T, ...], Field(min_length=1, max_length=256)]


class Body(BaseModel):
    """Base of the bodies of requests. A field that it does not list is refused by name."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class _Sampling(Body):
    """The fields that both kinds of requests have."""

    model: Text | None = None
    temperature: float = Field(default=1.0, ge=0, le=100)
    top_p: float = Field(default=1.0, gt=0, le=1)
    stop: Text | tuple[Text, ...] | None = None
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    n: Literal[1] = 1
    stream: Literal[False] = False
    user: Text | None = None

    def _generation(self, prompts: tuple[Prompt, ...], max_tokens: int | None) -> GenerationRequest:
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop or ()
        return GenerationRequest(
            prompts=prompts,
            max_tokens=max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            stop=tuple(one for one in stop if one),
            seed=self.seed,
        )


class CompletionRequest(_Sampling):
    """The body of POST /v1/completions. https://platform.openai.com/docs/api-reference/completions/create

    Fields that are not listed are refused by name. Those with one possible value are listed so that the refusal names
    that value.
    """

    prompt: Text | TokenIds | Batch[Text] | Batch[TokenIds]
    max_tokens: int = Field(default=16, ge=1)
    echo: Literal[False] = False
    logprobs: None = None

    def to_generation(self) -> GenerationRequest:
        """Returns the request in the form that engines take."""
        return self._generation(_prompts_of(self.prompt), self.max_tokens)

    def answer(self, generation: Generation, model: str) -> dict[str, Any]:
        """Returns OpenAI's body of an answer, with the version of the weights added."""
        choices = [
            {"index": index, "text": one.text, "finish_reason": one.finish_reason, "logprobs": None}
            for index, one in enumerate(generation.completions)
        ]
        return _answer("cmpl", "text_completion", choices, generation, model)


class TextPart(Body):
    """A part of a message's content. Images and sound are refused: the engine takes text."""

    type: Literal["text"]
    text: Text


def _form_of(content: object) -> str:
    return "text" if isinstance(content, str) else "parts"


#: Told apart by its form, so that a refusal speaks of the part that is wrong.
Content = Annotated[
    Annotated[Text, Tag("text")] | Annotated[tuple[TextPart, ...], Tag("parts")], Discriminator(_form_of)
]


class ChatMessage(Body):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content
    name: Text | None = None

    def to_template(self) -> dict[str, str]:
        """Returns the message as chat templates take it: the content as one text."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": content} | ({} if self.name is None else {"name": self.name})


class ChatRequest(_Sampling):
    """The body of POST /v1/chat/completions. https://platform.openai.com/docs/api-reference/chat/create

    Without a limit the answer ends where the engine ends it: see `GenerationRequest.max_tokens`.
    """

    messages: Batch[ChatMessage]
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: Literal[False] | None = None

    def to_generation(self) -> GenerationRequest:
        """Returns the request in the form that engines take. InputError for two different limits."""
        limits = {limit for limit in (self.max_tokens, self.max_completion_tokens) if limit is not None}
        if len(limits) > 1:
            raise InputError(
                "max_tokens and max_completion_tokens name different limits: leave max_tokens out", field="max_tokens"
            )
        conversation = Conversation(tuple(message.to_template() for message in self.messages))
        return self._generation((conversation,), limits.pop() if limits else None)

    def answer(self, generation: Generation, model: str) -> dict[str, Any]:
        """Returns OpenAI's body of an answer, with the version of the weights added."""
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": one.text},
                "finish_reason": one.finish_reason,
                "logprobs": None,
            }
            for index, one in enumerate(generation.completions)
        ]
        return _answer("chatcmpl", "chat.completion", choices, generation, model)


def _prompts_of(prompt: str | tuple[int, ...] | tuple[str, ...] | tuple[tuple[int, ...], ...]) -> tuple[Prompt, ...]:
    """Returns the prompts of a body: a string or a tuple of numbers is one prompt, any other tuple is a batch."""
    if isinstance(prompt, str):
        return (prompt,)
    tokens = tuple(part for part in prompt if isinstance(part, int))
    return (tokens,) if len(tokens) == len(prompt) else tuple(part for part in prompt if not isinstance(part, int))


def _answer(
    prefix: str, kind: str, choices: Sequence[dict[str, Any]], generation: Generation, model: str
) -> dict[str, Any]:
    completion_tokens = sum(one.num_tokens for one in generation.completions)
    return {
        "id": f"{prefix}-{uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": model,
        "choices": list(choices),
        "usage": {
            "prompt_tokens": generation.num_prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": generation.num_prompt_tokens + completion_tokens,
        },
        "weightline_version": generation.version,
    }
