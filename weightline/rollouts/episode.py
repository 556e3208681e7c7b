"""Episodes of several turns: the model writes, something of the user's answers, the model goes on.

A rollout function `play(session, prompt)`, async or plain, drives one episode:

    async def play(session, prompt):
        turn = await session.generate(tokenizer.encode(prompt), max_tokens=16)
        session.observe(tokenizer.encode(environment.step(turn.token_ids)))
        turn = await session.generate(max_tokens=16)
        session.fields["reward"] = environment.reward

The session keeps the context. Tokens that the model wrote are trained on, each with the version that wrote it; tokens
that were observed are masked.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from weightline.errors import InputError
from weightline.rollouts.sample import Sample, Span, joined
from weightline.rollouts.sampling import Sampling, seed_of

#: A rollout function. It returns nothing: the session has recorded what was said.
Play = Callable[[Any, Any], Awaitable[None] | None]


@dataclass(frozen=True, slots=True)
class Turn:
    """What the model wrote in one turn."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    spans: tuple[Span, ...]
    finish_reason: str | None
    replica: str


class Source(Protocol):
    """Makes one sample of a prompt: with the sampling, a seed, and the replica that may know the context."""

    def __call__(
        self, prompt_ids: tuple[int, ...], sampling: Sampling, seed: int, prefer: str | None
    ) -> Awaitable[Sample]: ...


class Session:
    """One episode, for an async rollout function."""

    def __init__(self, source: Source, sampling: Sampling, seed: int) -> None:
        self._source, self._sampling, self.seed = source, replace(sampling, n=1), seed
        """The seed of this episode, the same whenever its batch is made again: for the environment."""
        self.prompt_ids: tuple[int, ...] = ()
        self.turns: list[Turn] = []
        self.fields: dict[str, Any] = {}
        """Facts for reward functions, as JSON values."""
        self._token_ids: list[int] = []
        self._logprobs: list[float] = []
        self._mask: list[bool] = []

    @property
    def context(self) -> tuple[int, ...]:
        """The prompt and all tokens after it."""
        return (*self.prompt_ids, *self._token_ids)

    async def generate(
        self, token_ids: Sequence[int] | None = None, *, max_tokens: int | None = None, stop: Sequence[int] = ()
    ) -> Turn:
        """Returns what the model writes after the context.

        Args:
            token_ids: The whole context. The first turn needs it: it is the prompt. Later it may be left out; else it
                must begin with `context`, and what follows counts as observed.
            max_tokens: Tokens of this turn, at the most; by default those of the stage.
            stop: Tokens that end the turn, besides the end token.

        InputError for a context that does not go on from what was said.
        """
        if token_ids is not None:
            self._go_on_with(tuple(token_ids))
        if not self.prompt_ids:
            raise InputError("the first turn of an episode needs the tokens of its prompt", field="token_ids")
        sampling = replace(
            self._sampling,
            max_tokens=self._sampling.max_tokens if max_tokens is None else max_tokens,
            stop_token_ids=(*self._sampling.stop_token_ids, *stop),
        )
        prefer = self.turns[-1].replica if self.turns else None
        sample = await self._source(self.context, sampling, seed_of(self.seed, len(self.turns)), prefer)
        turn = Turn(sample.token_ids, sample.logprobs, sample.spans, sample.finish_reason, sample.replica)
        self.turns.append(turn)
        self._extend(turn.token_ids, turn.logprobs, is_written=True)
        return turn

    def observe(self, token_ids: Sequence[int]) -> None:
        """Appends tokens that the model did not write. InputError before the first turn: they belong to the prompt."""
        if not self.turns:
            raise InputError("what is observed before the first turn belongs to its prompt", field="token_ids")
        self._extend(token_ids, [0.0] * len(token_ids), is_written=False)

    def sample(self) -> Sample:
        """Returns the whole episode. InputError when the model said nothing."""
        if not self.turns:
            raise InputError("the rollout function ended without a turn of the model: call session.generate")
        return Sample(
            self.prompt_ids, tuple(self._token_ids), tuple(self._logprobs),
            joined(span for turn in self.turns for span in turn.spans),
            None if all(self._mask) else tuple(self._mask),
            self.turns[-1].finish_reason, self.turns[-1].replica, dict(self.fields),
        )  # fmt: skip

    def _go_on_with(self, token_ids: tuple[int, ...]) -> None:
        if not self.prompt_ids:
            self.prompt_ids = token_ids
            return
        known = self.context
        if token_ids[: len(known)] != known:
            raise InputError(
                "the tokens of a later turn do not begin with those that were said: tokenize only what is new, and "
                "pass it to session.observe",
                field="token_ids",
            )
        self.observe(token_ids[len(known) :])

    def _extend(self, token_ids: Sequence[int], logprobs: Sequence[float], *, is_written: bool) -> None:
        self._token_ids += token_ids
        self._logprobs += logprobs
        self._mask += [is_written] * len(token_ids)


class BlockingSession:
    """The same episode for a plain rollout function, which runs on a thread of its own: its calls block."""

    def __init__(self, session: Session, loop: asyncio.AbstractEventLoop) -> None:
        self._session, self._loop = session, loop

    @property
    def seed(self) -> int:
        """The seed of this episode."""
        return self._session.seed

    @property
    def context(self) -> tuple[int, ...]:
        """The prompt and all tokens after it."""
        return self._session.context

    @property
    def turns(self) -> list[Turn]:
        """What the model wrote so far."""
        return self._session.turns

    @property
    def fields(self) -> dict[str, Any]:
        """Facts for reward functions, as JSON values."""
        return self._session.fields

    def generate(
        self, token_ids: Sequence[int] | None = None, *, max_tokens: int | None = None, stop: Sequence[int] = ()
    ) -> Turn:
        """Returns what the model writes after the context: see `Session.generate`."""
        asked = self._session.generate(token_ids, max_tokens=max_tokens, stop=stop)
        return asyncio.run_coroutine_threadsafe(asked, self._loop).result()

    def observe(self, token_ids: Sequence[int]) -> None:
        """Appends tokens that the model did not write."""
        self._session.observe(token_ids)


async def play_episode(play: Play, session: Session, prompt: Any) -> Sample:
    """Returns the episode that the function plays. Raises what it raises."""
    if inspect.iscoroutinefunction(play) or inspect.iscoroutinefunction(type(play).__call__):
        await play(session, prompt)  # type: ignore[misc]
    else:
        blocking = BlockingSession(session, asyncio.get_running_loop())
        await _on_thread(lambda: play(blocking, prompt))
    return session.sample()


async def _on_thread(work: Callable[[], object]) -> None:
    """Does the work on a thread of its own, which does not keep the process from ending."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()

    def settle(error: BaseException | None) -> None:
        if done.done():
            return
        if error is None:
            done.set_result(None)
        else:
            done.set_exception(error)

    def run() -> None:
        error: BaseException | None = None
        try:
            work()
        except BaseException as raised:  # noqa: BLE001 - it is raised where the episode is awaited
            # A future takes no StopIteration.
            error = RuntimeError(f"{type(raised).__name__}: {raised}") if isinstance(raised, StopIteration) else raised
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, error)

    threading.Thread(target=run, name="weightline-episode", daemon=True).start()
    await done
