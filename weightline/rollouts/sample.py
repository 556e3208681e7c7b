"""A sample: one completion with its log probabilities, and the versions of the weights that wrote its tokens."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from weightline.errors import InputError

#: Token ids are smaller: they index the rows of an embedding.
_MAX_TOKEN_ID = 2**31


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive tokens that one version wrote."""

    version: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Sample:
    """One completion. InputError when its parts do not belong together.

    The spans cover, in order, the tokens that the model wrote: all of them, or those with a True in `mask`.
    """

    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    """The completion, with the end token if the model wrote it."""
    logprobs: tuple[float, ...]
    """Of each token, after temperature and the like, as float32. 0.0 for tokens that the model did not write."""
    spans: tuple[Span, ...]
    mask: tuple[bool, ...] | None = None
    """Which tokens the model wrote; None when it wrote all of them."""
    finish_reason: str | None = None
    """`stop` after the end token or a stop token, `length` at the limit."""
    replica: str = ""
    """Name of the replica that answered; the last one of an episode."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """Further facts of an episode, as JSON values."""

    def __post_init__(self) -> None:
        for name in ("prompt_ids", "token_ids"):
            if not all(type(one) is int and 0 <= one < _MAX_TOKEN_ID for one in getattr(self, name)):
                raise InputError(f"{name} of a sample are not all token ids", field=name)
        if len(self.logprobs) != len(self.token_ids):
            raise InputError(f"{len(self.token_ids)} tokens have {len(self.logprobs)} logprobs", field="logprobs")
        if not all(type(one) is float and math.isfinite(one) for one in self.logprobs):
            raise InputError("logprobs of a sample are not all finite numbers", field="logprobs")
        if self.mask is not None and len(self.mask) != len(self.token_ids):
            raise InputError(f"{len(self.token_ids)} tokens have {len(self.mask)} marks", field="mask")
        covered = sum(span.num_tokens for span in self.spans)
        if covered != self.num_written or not all(span.num_tokens > 0 and span.version >= 0 for span in self.spans):
            raise InputError(f"the spans cover {covered} of {self.num_written} tokens of the model", field="spans")

    @property
    def num_written(self) -> int:
        """Number of the tokens that the model wrote."""
        return len(self.token_ids) if self.mask is None else sum(self.mask)

    @property
    def versions(self) -> frozenset[int]:
        """The versions that wrote its tokens."""
        return frozenset(span.version for span in self.spans)

    @property
    def is_mixed(self) -> bool:
        """Whether several versions wrote it."""
        return len(self.versions) > 1

    def to_json(self, *, with_prompt: bool = True) -> dict[str, Any]:
        """Returns the sample as JSON values, about 20 bytes a token. Fields with their usual value are left out."""
        body: dict[str, Any] = {"prompt_ids": list(self.prompt_ids)} if with_prompt else {}
        body["token_ids"] = list(self.token_ids)
        body["logprobs"] = _short(self.logprobs)
        body["spans"] = [[span.version, span.num_tokens] for span in self.spans]
        if self.mask is not None:
            body["mask"] = [int(one) for one in self.mask]
        optional = {"finish_reason": self.finish_reason, "replica": self.replica, "fields": dict(self.fields)}
        return body | {name: value for name, value in optional.items() if value}

    @classmethod
    def from_json(cls, body: Mapping[str, Any], prompt_ids: Sequence[int] | None = None) -> Sample:
        """Returns the sample of a JSON object. InputError for one that `to_json` did not write.

        `prompt_ids` are those of an object that was written without its prompt.
        """
        try:
            mask = body.get("mask")
            return cls(
                prompt_ids=tuple(body["prompt_ids"] if prompt_ids is None else prompt_ids),
                token_ids=tuple(body["token_ids"]),
                logprobs=as_float32(body["logprobs"]),
                spans=tuple(Span(version, num_tokens) for version, num_tokens in body["spans"]),
                mask=None if mask is None else tuple(bool(one) for one in mask),
                finish_reason=body.get("finish_reason"),
                replica=body.get("replica", ""),
                fields=dict(body.get("fields", {})),
            )
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise InputError(f"this is no sample: {type(error).__name__}: {error}", field="sample") from error


def as_float32(numbers: Iterable[float]) -> tuple[float, ...]:
    """Returns the numbers, each rounded to the float32 that engines compute in. ValueError for others than numbers."""
    found = list(numbers)
    if any(isinstance(one, bool) or not isinstance(one, int | float) for one in found):
        raise ValueError("not all of these are numbers")
    with np.errstate(over="ignore"):
        return tuple(np.asarray(found, np.float64).astype(np.float32).astype(np.float64).tolist())


def joined(spans: Iterable[Span]) -> tuple[Span, ...]:
    """Returns the spans with neighbours of one version made one, and without empty ones."""
    found: list[Span] = []
    for span in spans:
        if found and found[-1].version == span.version:
            found[-1] = Span(span.version, found[-1].num_tokens + span.num_tokens)
        elif span.num_tokens:
            found.append(span)
    return tuple(found)


def _short(logprobs: Sequence[float]) -> list[float]:
    """Returns numbers with few digits that round to the same float32: half the bytes in JSON."""
    return [float(str(one)) for one in np.asarray(logprobs, np.float32)]
