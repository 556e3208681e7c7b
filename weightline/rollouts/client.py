"""One replica over HTTP: its state, the wait for a version, and samples. Checks every part of every answer.

The route is the first of those that the replica's status offers:

- `/weightline/rollouts` (embedded): many prompts in one request, all samples by one version;
- `/inference/v1/generate` (vLLM): one prompt a request, with the versions that wrote each span of tokens;
- `/v1/completions` otherwise: one prompt a request, all samples by the version of the answer's header.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import httpx
from pydantic import BaseModel, ConfigDict, ValidationError

from weightline.errors import ApplyError, InputError, VersionNotServedError, WeightlineError
from weightline.rollouts.sample import Sample, Span, as_float32, joined
from weightline.rollouts.sampling import Sampling
from weightline.serving.engines.base import VersionBounds
from weightline.serving.http.errors import error_of
from weightline.serving.http.names import (
    COMPLETIONS_ROUTE,
    GENERATE_ROUTE,
    KEEPALIVE_SECONDS,
    MIN_VERSION_HEADER,
    MIXING_HEADER,
    ROLLOUTS_ROUTE,
    VERSION_HEADER,
    WAIT_HEADER,
)
from weightline.serving.replica.status import ServedVersion

Mixing = Literal["deny", "allow"]
_ROUTES = frozenset({ROLLOUTS_ROUTE, GENERATE_ROUTE, COMPLETIONS_ROUTE})
_CONNECT_SECONDS = 5.0
#: Bytes of an answer: JSON of a token's id and logprob takes less, with names and texts of its choice.
_NBYTES_A_TOKEN = 1024
_MAX_SMALL_NBYTES = 1024**2

T = TypeVar("T", bound=BaseModel)


class Offer(BaseModel):
    """The part of a replica's status that rollouts need."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    replica: str
    chain: str
    version: int | None
    last_error: str | None = None
    follow_error: str | None = None
    logprobs_mode: str | None = None
    max_model_len: int | None = None
    rollout_routes: tuple[str, ...] = ()

    @property
    def route(self) -> str:
        """The route for samples: the first that is known of those that the replica names, best one first."""
        return next((route for route in self.rollout_routes if route in _ROUTES), COMPLETIONS_ROUTE)

    @property
    def takes_many(self) -> bool:
        """Whether one request takes many prompts."""
        return self.route == ROLLOUTS_ROUTE


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which version may answer: one at least as new as `min_version`, or exactly `pinned`."""

    min_version: int = 0
    pinned: int | None = None
    mixing: Mixing = "deny"

    def takes(self, version: int | None) -> bool:
        """Returns whether this version may answer."""
        bounds = VersionBounds(lowest=self.min_version) if self.pinned is None else VersionBounds(pinned=self.pinned)
        return bounds.accept(version)

    def headers(self, wait_seconds: float) -> dict[str, str]:
        """Returns the headers by which a replica waits for such a version, and refuses with any other."""
        found = {WAIT_HEADER: f"{wait_seconds:g}"}
        if self.pinned is None:
            found[MIN_VERSION_HEADER] = str(self.min_version)
        else:
            found[VERSION_HEADER] = str(self.pinned)
        return found | ({MIXING_HEADER: "allow"} if self.mixing == "allow" else {})


@dataclass(frozen=True, slots=True)
class _Asked:
    """What all requests for one batch of prompts have in common."""

    offer: Offer
    sampling: Sampling
    wanted: Wanted
    headers: Mapping[str, str]


class ReplicaClient:
    """The client of one replica. All methods belong to one event loop.

    They raise ApplyError with the replica's URL: with `is_unreachable` when it does not answer, and for an answer of a
    wrong shape; VersionNotServedError, with the version that it holds, when that is another one than wanted; InputError
    when it refuses the request itself, which another replica would refuse as well.
    """

    def __init__(self, url: str, request_seconds: float = 300.0) -> None:
        """Opens nothing yet. A request that takes longer than `request_seconds` counts as lost."""
        self.url = url.rstrip("/")
        self._request_seconds = request_seconds
        limits = httpx.Limits(max_keepalive_connections=64, keepalive_expiry=KEEPALIVE_SECONDS)
        self._http = httpx.AsyncClient(trust_env=False, limits=limits, timeout=request_seconds)

    async def close(self) -> None:
        """Closes its connections."""
        await self._http.aclose()

    async def status(self) -> Offer:
        """Returns what the replica offers."""
        return self._parsed(Offer, (await self._ask("GET", "/weightline/status", 10.0))[1])

    async def wait_for(self, min_version: int, wait_seconds: float) -> ServedVersion:
        """Returns the version that is served, once it is at least `min_version` or the time is over."""
        route = f"/weightline/version?min={min_version}&wait={wait_seconds:g}"
        return self._parsed(ServedVersion, (await self._ask("GET", route, wait_seconds + 10.0))[1])

    async def generate(
        self,
        offer: Offer,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        sampling: Sampling,
        wanted: Wanted,
        wait_seconds: float = 5.0,
    ) -> tuple[tuple[Sample, ...], ...]:
        """Returns `sampling.n` samples of each prompt. On one version a seed gives the same samples again."""
        _require_room(offer, prompts, sampling)
        asked = _Asked(offer, sampling, wanted, wanted.headers(wait_seconds))
        if offer.takes_many:
            return await self._rollouts(asked, prompts, seeds)
        one = self._generate if offer.route == GENERATE_ROUTE else self._completions
        pairs = zip(prompts, seeds, strict=True)
        tasks = [asyncio.ensure_future(one(asked, prompt, seed)) for prompt, seed in pairs]
        try:
            return tuple(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()

    async def _rollouts(
        self, asked: _Asked, prompts: Sequence[Sequence[int]], seeds: Sequence[int]
    ) -> tuple[tuple[Sample, ...], ...]:
        sampling = asked.sampling
        body = {
            "prompts": [list(prompt) for prompt in prompts], "n": sampling.n, "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature, "top_p": sampling.top_p, "seed": list(seeds),
            **_others(sampling, has_stop=False),
        }  # fmt: skip
        _, received = await self._post(ROLLOUTS_ROUTE, body, asked, len(prompts) * sampling.n * sampling.max_tokens)
        with _Shape(self.url):
            version, groups = received["version"], received["samples"]
            _require(len(groups) == len(prompts), f"{len(groups)} groups for {len(prompts)} prompts")
            return tuple(
                self._group(
                    prompt,
                    [(one, one["token_ids"], one["logprobs"], [(version, len(one["token_ids"]))]) for one in group],
                    asked,
                )
                for prompt, group in zip(prompts, groups, strict=True)
            )  # fmt: skip

    async def _generate(self, asked: _Asked, prompt: Sequence[int], seed: int) -> tuple[Sample, ...]:
        sampling = asked.sampling
        params = {
            "n": sampling.n, "max_tokens": sampling.max_tokens, "temperature": sampling.temperature,
            "top_p": sampling.top_p, "logprobs": 0, "seed": seed, **_others(sampling, has_stop=True),
        }  # fmt: skip
        body = {"token_ids": list(prompt), "sampling_params": params}
        answered, received = await self._post(GENERATE_ROUTE, body, asked, sampling.n * sampling.max_tokens)
        with _Shape(self.url):
            found = []
            for choice in _in_order(received["choices"]):
                logprobs = [token["logprob"] for token in choice["logprobs"]["content"]]
                spans = [
                    (int(span["version"]), span["end"] - span["start"]) for span in choice.get("weight_versions") or ()
                ]
                one_version = [(_version_of(answered), len(choice["token_ids"]))]
                found.append((choice, choice["token_ids"], logprobs, spans or one_version))
            return self._group(prompt, found, asked)

    async def _completions(self, asked: _Asked, prompt: Sequence[int], seed: int) -> tuple[Sample, ...]:
        sampling = asked.sampling
        body = {
            "prompt": list(prompt), "n": sampling.n, "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature, "top_p": sampling.top_p, "logprobs": 0, "return_token_ids": True,
            "seed": seed, **_others(sampling, has_stop=False),
        }  # fmt: skip
        answered, received = await self._post(COMPLETIONS_ROUTE, body, asked, sampling.n * sampling.max_tokens)
        with _Shape(self.url):
            version = _version_of(answered)
            found = [
                (one, one["token_ids"], one["logprobs"]["token_logprobs"], [(version, len(one["token_ids"]))])
                for one in _in_order(received["choices"])
            ]
            return self._group(prompt, found, asked)

    def _group(
        self,
        prompt: Sequence[int],
        found: Sequence[tuple[Mapping[str, Any], list[int], list[float], list[tuple[int, int]]]],
        asked: _Asked,
    ) -> tuple[Sample, ...]:
        """Returns the samples of one prompt. ValueError, or InputError, for parts that do not belong together."""
        sampling = asked.sampling
        _require(len(found) == sampling.n, f"{len(found)} samples of {sampling.n}")
        samples = []
        for one, token_ids, logprobs, spans in found:
            _require(len(token_ids) <= sampling.max_tokens, f"{len(token_ids)} tokens of {sampling.max_tokens}")
            _require(all(type(part) is int for span in spans for part in span), "spans that are no numbers")
            _require(all(asked.wanted.takes(version) for version, _ in spans), f"other versions: {spans}")
            reason = one.get("finish_reason")
            _require(reason is None or isinstance(reason, str), "a finish_reason that is no text")
            sample = Sample(
                tuple(prompt), tuple(token_ids), as_float32(logprobs),
                joined(Span(version, num_tokens) for version, num_tokens in spans),
                finish_reason=reason, replica=asked.offer.replica,
            )  # fmt: skip
            samples.append(ended_at(sample, sampling.stop_token_ids))
        return tuple(samples)

    def _parsed(self, cls: type[T], body: object) -> T:
        try:
            return cls.model_validate(body)
        except ValidationError as error:
            raise self._lost("it is not a replica") from error

    def _lost(self, reason: str) -> ApplyError:
        return ApplyError(f"the replica at {self.url} does not answer: {reason}", url=self.url, is_unreachable=True)

    async def _post(
        self, route: str, body: dict[str, Any], asked: _Asked, max_tokens: int
    ) -> tuple[httpx.Headers, Any]:
        max_nbytes = _MAX_SMALL_NBYTES + max_tokens * _NBYTES_A_TOKEN
        return await self._ask("POST", route, self._request_seconds, body, asked.headers, max_nbytes)

    async def _ask(
        self,
        method: str,
        route: str,
        timeout_seconds: float,
        body: dict[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
        max_nbytes: int = _MAX_SMALL_NBYTES,
    ) -> tuple[httpx.Headers, Any]:
        """Returns the headers and the JSON of an answer with a status of success."""
        timeout = httpx.Timeout(timeout_seconds, connect=min(timeout_seconds, _CONNECT_SECONDS))
        raw = bytearray()
        try:
            async with (
                asyncio.timeout(timeout_seconds),
                self._http.stream(method, self.url + route, json=body, headers=headers, timeout=timeout) as answer,
            ):
                async for part in answer.aiter_bytes():
                    raw += part
                    if len(raw) > max_nbytes:
                        raise self._lost(f"its answer is longer than {max_nbytes} bytes")
            received: object = json.loads(raw)
        except (httpx.HTTPError, httpx.InvalidURL, TimeoutError, ValueError, RecursionError) as error:
            raise self._lost(str(error) or type(error).__name__) from error
        if answer.is_success:
            return answer.headers, received
        raise self._refusal(answer.status_code, answer.headers, received, route)

    def _refusal(self, status: int, headers: httpx.Headers, received: object, route: str) -> WeightlineError:
        fallback = f"{route} answered {status}"
        try:
            error = error_of(received, fallback)
        except TypeError:  # facts under names that no error takes
            error = ApplyError(fallback)
        if isinstance(error, InputError) or status in (400, 413, 422):
            return InputError(f"the replica at {self.url} refuses the request: {error}", url=self.url)
        if status == 409:
            held = headers.get(VERSION_HEADER, "")
            return VersionNotServedError(
                f"the replica at {self.url}: {error}", url=self.url, version=int(held) if held.isdecimal() else None
            )
        return ApplyError(f"the replica at {self.url}: {error}", url=self.url, status=status)


def ended_at(sample: Sample, stop_token_ids: Sequence[int]) -> Sample:
    """Returns the sample up to the first of the stop tokens, with it. A replica may not know them, or go on after."""
    at = next((at for at, token in enumerate(sample.token_ids) if token in stop_token_ids), None)
    if at is None:
        return sample
    left, spans = at + 1, []
    for span in sample.spans:
        spans.append(Span(span.version, min(span.num_tokens, left)))
        left -= spans[-1].num_tokens
    return Sample(
        sample.prompt_ids, sample.token_ids[: at + 1], sample.logprobs[: at + 1], joined(spans),
        finish_reason="stop", replica=sample.replica,
    )  # fmt: skip


def _others(sampling: Sampling, *, has_stop: bool) -> dict[str, Any]:
    """Returns the parameters that are sent only where they are set, since not every replica knows them."""
    usual = Sampling()
    names = ("top_k", "min_p", "repetition_penalty")
    found: dict[str, Any] = {
        name: getattr(sampling, name) for name in names if getattr(sampling, name) != getattr(usual, name)
    }
    return found | ({"stop_token_ids": list(sampling.stop_token_ids)} if has_stop and sampling.stop_token_ids else {})


def _require_room(offer: Offer, prompts: Sequence[Sequence[int]], sampling: Sampling) -> None:
    longest = max(map(len, prompts), default=0)
    if offer.max_model_len is not None and longest + sampling.max_tokens > offer.max_model_len:
        raise InputError(
            f"a prompt of {longest} tokens and {sampling.max_tokens} more are over the {offer.max_model_len} that "
            f"replica {offer.replica} takes: shorten prompts or completions",
            field="max_tokens",
        )


def _in_order(choices: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return sorted(choices, key=lambda choice: choice["index"])


def _version_of(headers: httpx.Headers) -> int:
    """Returns the one version that wrote an answer. ValueError where it names two, or none."""
    return int(headers.get(VERSION_HEADER, "no version"))


def _require(is_so: bool, what: str) -> None:
    if not is_so:
        raise ValueError(f"it has {what}")


class _Shape:
    """Turns every error of reading an answer into an ApplyError that names the replica."""

    def __init__(self, url: str) -> None:
        self._url = url

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if isinstance(error, KeyError | TypeError | ValueError | AttributeError | IndexError | InputError):
            reason = f"{type(error).__name__}: {error}" if isinstance(error, KeyError) else str(error)
            raise ApplyError(
                f"the answer of the replica at {self._url} cannot be used: {reason}", url=self._url, reason="shape"
            ) from error
