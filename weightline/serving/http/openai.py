"""The bodies of OpenAI's completions and chat completions, as far as the embedded server takes and gives them."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag

from weightline.errors import InputError
from weightline.serving.engines.base import Completion, Conversation, Generation, GenerationRequest, Prompt

T = TypeVar("T")

MAX_SAMPLES = 256
"""Samples of one prompt."""
MAX_SAMPLES_OF_REQUEST = 4096
MAX_TOP_LOGPROBS = 20


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


Seed = Annotated[int, Field(ge=0, lt=2**63, strict=True)]


def seeds_from(seed: int, num_prompts: int) -> tuple[int, ...]:
    """Returns the seeds of a request's prompts: the given one and those that follow it."""
    return tuple((seed + number) % 2**63 for number in range(num_prompts))


def require_few_samples(num_prompts: int, num_samples: int) -> None:
    """Raises InputError for more samples than one request may ask for, over all of its prompts."""
    if num_prompts * num_samples > MAX_SAMPLES_OF_REQUEST:
        raise InputError(
            f"{num_prompts} prompts with n = {num_samples} are more than {MAX_SAMPLES_OF_REQUEST} samples: send more "
            "requests",
            field="n",
        )


class Body(BaseModel):
    """Base of the bodies of requests. A field that it does not list is refused by name."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class _Sampling(Body):
    """The fields that both kinds of requests have."""

    model: Text | None = None
    temperature: float = Field(default=1.0, ge=0, le=100)
    top_p: float = Field(default=1.0, gt=0, le=1)
    stop: Text | tuple[Text, ...] | None = None
    seed: Seed | None = None
    n: int = Field(default=1, ge=1, le=MAX_SAMPLES)
    stream: Literal[False] = False
    user: Text | None = None
    return_token_ids: bool | None = None
    """vLLM's: adds `token_ids` and `prompt_token_ids` to each choice."""
    return_tokens_as_token_ids: bool | None = None
    """vLLM's: logprobs name tokens by their ids, as `token_id:7`."""
    # vLLM's, which TRL's client sends with every request: no value but the one that leaves the distribution as it is.
    repetition_penalty: Annotated[float, Field(ge=1, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1, le=0)] = 0
    min_p: Annotated[float, Field(ge=0, le=0)] = 0.0

    def _generation(
        self, prompts: tuple[Prompt, ...], max_tokens: int | None, num_top_logprobs: int | None
    ) -> GenerationRequest:
        require_few_samples(len(prompts), self.n)
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop or ()
        return GenerationRequest(
            prompts=prompts,
            max_tokens=max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            stop=tuple(one for one in stop if one),
            seeds=None if self.seed is None else seeds_from(self.seed, len(prompts)),
            num_samples=self.n,
            num_top_logprobs=num_top_logprobs,
        )

    def _names(self, generation: Generation) -> Mapping[int, str]:
        """Returns what logprobs call each token: its text, or its id."""
        if self.return_tokens_as_token_ids:
            return {token: f"token_id:{token}" for token in generation.token_texts}
        return generation.token_texts

    def _token_ids(self, generation: Generation, index: int) -> dict[str, Any]:
        """Returns the token ids of a choice and of its prompt, if they are wanted."""
        if not self.return_token_ids:
            return {}
        return {
            "token_ids": list(generation.completions[index].token_ids),
            "prompt_token_ids": list(generation.prompts[index // self.n]),
        }


class CompletionRequest(_Sampling):
    """The body of POST /v1/completions. https://platform.openai.com/docs/api-reference/completions/create

    Fields that are not listed are refused by name. Those with one possible value are listed so that the refusal names
    that value.
    """

    prompt: Text | TokenIds | Batch[Text] | Batch[TokenIds]
    max_tokens: int = Field(default=16, ge=1)
    echo: Literal[False] = False
    logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)

    def to_generation(self) -> GenerationRequest:
        """Returns the request in the form that engines take. InputError for too many samples."""
        return self._generation(_prompts_of(self.prompt), self.max_tokens, self.logprobs)

    def answer(self, generation: Generation, model: str) -> dict[str, Any]:
        """Returns OpenAI's body of an answer, with the version of the weights added."""
        choices = [
            {
                "index": index,
                "text": one.text,
                "finish_reason": one.finish_reason,
                "logprobs": _completion_logprobs(one, self._names(generation)),
                **self._token_ids(generation, index),
            }
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
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)

    def to_generation(self) -> GenerationRequest:
        """Returns the request in the form that engines take. InputError for fields that contradict each other."""
        limits = {limit for limit in (self.max_tokens, self.max_completion_tokens) if limit is not None}
        if len(limits) > 1:
            raise InputError(
                "max_tokens and max_completion_tokens name different limits: leave max_tokens out", field="max_tokens"
            )
        if self.top_logprobs and not self.logprobs:
            raise InputError("top_logprobs needs logprobs: true", field="top_logprobs")
        conversation = Conversation(tuple(message.to_template() for message in self.messages))
        num_top_logprobs = self.top_logprobs or 0 if self.logprobs else None
        return self._generation((conversation,), limits.pop() if limits else None, num_top_logprobs)

    def answer(self, generation: Generation, model: str) -> dict[str, Any]:
        """Returns OpenAI's body of an answer, with the version of the weights added."""
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": one.text},
                "finish_reason": one.finish_reason,
                "logprobs": _chat_logprobs(one, self._names(generation)),
                **self._token_ids(generation, index),
            }
            for index, one in enumerate(generation.completions)
        ]
        answer = _answer("chatcmpl", "chat.completion", choices, generation, model)
        return answer | ({"prompt_token_ids": list(generation.prompts[0])} if self.return_token_ids else {})


def _prompts_of(prompt: str | tuple[int, ...] | tuple[str, ...] | tuple[tuple[int, ...], ...]) -> tuple[Prompt, ...]:
    """Returns the prompts of a body: a string or a tuple of numbers is one prompt, any other tuple is a batch."""
    if isinstance(prompt, str):
        return (prompt,)
    tokens = tuple(part for part in prompt if isinstance(part, int))
    return (tokens,) if len(tokens) == len(prompt) else tuple(part for part in prompt if not isinstance(part, int))


def _completion_logprobs(one: Completion, text_of: Mapping[int, str]) -> dict[str, Any] | None:
    """Returns the logprobs of a completion's tokens in OpenAI's form, the drawn token always among the top ones."""
    if one.logprobs is None:
        return None
    texts = [text_of[token] for token in one.token_ids]
    drawn = zip(texts, one.logprobs, strict=True)
    tops = one.top_logprobs or ({},) * len(texts)
    return {
        "tokens": texts,
        "token_logprobs": list(one.logprobs),
        "top_logprobs": [
            {text_of[token]: found for token, found in top.items()} | {text: logprob}
            for (text, logprob), top in zip(drawn, tops, strict=True)
        ],
        "text_offset": list(accumulate(map(len, texts[:-1]), initial=0)) if texts else [],
    }


def _chat_logprobs(one: Completion, text_of: Mapping[int, str]) -> dict[str, Any] | None:
    """Returns the logprobs of an answer's tokens in OpenAI's form."""
    if one.logprobs is None:
        return None

    def entry(token: int, logprob: float) -> dict[str, Any]:
        text = text_of[token]
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    tops = one.top_logprobs or ({},) * len(one.token_ids)
    steps = zip(one.token_ids, one.logprobs, tops, strict=True)
    return {
        "content": [
            entry(token, logprob) | {"top_logprobs": [entry(*found) for found in top.items()]}
            for token, logprob, top in steps
        ]
    }


def _answer(
    prefix: str, kind: str, choices: Sequence[dict[str, Any]], generation: Generation, model: str
) -> dict[str, Any]:
    completion_tokens = sum(len(one.token_ids) for one in generation.completions)
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
