"""A generation batch: its rows, its groups, what is made of them, and its form in a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from weightline.errors import InputError
from weightline.rollouts.fleet import Answered, Progress
from weightline.rollouts.sample import Sample
from weightline.rollouts.sampling import Sampling

_FORMAT = 1


@dataclass(frozen=True, slots=True)
class ReplicaShare:
    """What a replica has done."""

    num_samples: int = 0
    """Samples; for episodes, turns."""
    seconds: float = 0.0
    """Time in which it had a request at least."""
    num_errors: int = 0
    """Requests that failed and were made again."""

    @property
    def samples_per_second(self) -> float:
        """Samples a second while it had a request."""
        return self.num_samples / self.seconds if self.seconds else 0.0

    def plus(self, other: ReplicaShare) -> ReplicaShare:
        """Returns both together."""
        return ReplicaShare(
            self.num_samples + other.num_samples, self.seconds + other.seconds, self.num_errors + other.num_errors
        )


@dataclass(frozen=True, slots=True)
class Taken:
    """The samples of a batch, and how they came about."""

    samples: tuple[Sample, ...]
    """One for each row of the prompts, in their order."""
    wait_seconds: float
    """That training waited for them."""
    behind_seconds: float
    """That the batch waited for a version or a replica before the first request."""
    generate_seconds: float
    """From the first request to the last answer."""
    num_regenerated: int
    """Samples that had become stale and were made again."""
    num_retries: int
    """Requests and episodes that failed and were made again."""
    queue_length: int
    """Batches that were requested, without this one."""
    replicas: Mapping[str, ReplicaShare]
    """What each replica did for this batch."""

    @property
    def num_mixed(self) -> int:
        """Samples that several versions wrote."""
        return sum(sample.is_mixed for sample in self.samples)


@dataclass(slots=True, eq=False)
class Batch:
    """One batch. What it has of samples belongs to the producer's event loop until its future is done."""

    key: str
    """Its number k, or the name of a batch outside the queue."""
    prompts: tuple[Any, ...]
    """One for each row: tuples of token ids, or JSON values."""
    rows: tuple[tuple[int, ...], ...]
    """The rows of each group."""
    min_version: int
    sampling: Sampling
    progress: Progress
    asked_at: float = 0.0
    future: Future[None] | None = None
    """None while nothing is being made: as it came from a checkpoint."""

    @property
    def num_rows(self) -> int:
        return len(self.prompts)

    @property
    def num_missing(self) -> int:
        """Rows without a sample."""
        return sum(len(self.rows[at]) for at, samples in enumerate(self.progress.samples) if samples is None)

    def groups_with(self, is_meant: Callable[[Sample], bool]) -> list[int]:
        """Returns the groups that hold such a sample."""
        return [at for at, samples in enumerate(self.progress.samples) if any(map(is_meant, samples or ()))]

    def forget(self, groups: Iterable[int]) -> None:
        """Drops the samples of these groups, which are to be made again."""
        for at in groups:
            self.progress.samples[at] = None

    def taken(self, wait_seconds: float, num_regenerated: int, queue_length: int) -> Taken:
        """Returns the samples of a batch that is done, in the order of its rows."""
        progress = self.progress
        samples: dict[int, Sample] = {}
        for rows, group in zip(self.rows, progress.samples, strict=True):
            assert group is not None
            samples.update(zip(rows, group, strict=True))
        behind = 0.0 if progress.begun_at is None else progress.begun_at - self.asked_at
        last = max((one.ended_at for one in progress.answered), default=progress.begun_at or 0.0)
        return Taken(
            tuple(samples[row] for row in range(self.num_rows)), wait_seconds, max(0.0, behind),
            last - (progress.begun_at or 0.0), num_regenerated, progress.num_retries, queue_length,
            shares_of(progress.answered),
        )  # fmt: skip


def batch_of(key: str, prompts: Sequence[Any], min_version: int, sampling: Sampling, *, is_tokens: bool) -> Batch:
    """Returns a batch of which nothing is made. InputError for prompts that are no token ids, or no JSON values.

    Equal token ids in a row are a group of at most `sampling.n`. With a rollout function each row is its own group.
    """
    rows = tuple(_token_ids(prompt) if is_tokens else _json_value(prompt) for prompt in prompts)
    groups = tuple(_grouped(rows, sampling.n)) if is_tokens else tuple((row,) for row in range(len(rows)))
    return Batch(key, rows, groups, min_version, sampling, Progress([None] * len(groups)))


def shares_of(answered: Iterable[Answered]) -> dict[str, ReplicaShare]:
    """Returns what each replica has done, by its requests, which may overlap."""
    found: dict[str, ReplicaShare] = {}
    busy_until: dict[str, float] = {}
    for one in sorted(answered, key=lambda one: one.begun_at):
        seconds = max(0.0, one.ended_at - max(one.begun_at, busy_until.get(one.replica, 0.0)))
        busy_until[one.replica] = max(one.ended_at, busy_until.get(one.replica, 0.0))
        found[one.replica] = found.get(one.replica, ReplicaShare()).plus(ReplicaShare(one.num_samples, seconds))
    return found


def with_errors(shares: Mapping[str, ReplicaShare], num_errors: Mapping[str, int]) -> dict[str, ReplicaShare]:
    """Returns the shares with the number of errors of each replica."""
    names = dict.fromkeys((*shares, *num_errors))
    return {name: replace(shares.get(name, ReplicaShare()), num_errors=num_errors.get(name, 0)) for name in names}


def state_of(batches: Iterable[Batch]) -> dict[str, Any]:
    """Returns batches as JSON values: each group's prompt once, with its samples if they are made."""
    return {"format": _FORMAT, "batches": [_batch_state(batch) for batch in batches]}


def restored(state: Mapping[str, Any], sampling: Sampling, *, is_tokens: bool) -> list[Batch]:
    """Returns the batches that `state_of` wrote. InputError for any other state."""
    if state.get("format") != _FORMAT:
        raise InputError(f"rollouts of format {state.get('format')!r} cannot be read by this release", field="format")
    try:
        return [_restored_batch(body, sampling, is_tokens) for body in state["batches"]]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"this is no state of rollouts: {type(error).__name__}: {error}", field="batches") from error


def _batch_state(batch: Batch) -> dict[str, Any]:
    groups = []
    for rows, samples in zip(batch.rows, batch.progress.samples, strict=True):
        prompt = batch.prompts[rows[0]]
        is_tokens = isinstance(prompt, tuple)
        made = None if samples is None else [sample.to_json(with_prompt=not is_tokens) for sample in samples]
        shown = {"prompt_ids": list(prompt)} if is_tokens else {"prompt": prompt}
        groups.append(shown | {"n": len(rows), "samples": made})
    return {"k": int(batch.key), "min_version": batch.min_version, "groups": groups}


def _restored_batch(body: Mapping[str, Any], sampling: Sampling, is_tokens: bool) -> Batch:
    prompts: list[Any] = []
    rows: list[tuple[int, ...]] = []
    made: list[tuple[Sample, ...] | None] = []
    for group in body["groups"]:
        prompt = _token_ids(group["prompt_ids"]) if is_tokens else group["prompt"]
        rows.append(tuple(range(len(prompts), len(prompts) + group["n"])))
        prompts += [prompt] * group["n"]
        own_prompt = prompt if is_tokens else None
        samples = None if group["samples"] is None else [Sample.from_json(one, own_prompt) for one in group["samples"]]
        if samples is not None and len(samples) != group["n"]:
            raise ValueError(f"{len(samples)} samples of {group['n']}")
        made.append(None if samples is None else tuple(samples))
    return Batch(str(int(body["k"])), tuple(prompts), tuple(rows), body["min_version"], sampling, Progress(made))


def _grouped(rows: Sequence[tuple[int, ...]], n: int) -> Iterator[tuple[int, ...]]:
    """Yields the rows of each group: equal prompts in a row, `n` at the most."""
    at = 0
    for _, same in groupby(rows):
        end = at + len(list(same))
        while at < end:
            yield tuple(range(at, min(at + n, end)))
            at = min(at + n, end)


def _token_ids(prompt: Any) -> tuple[int, ...]:
    try:
        found = tuple(prompt)
    except TypeError:
        found = (None,)
    if not found or not all(type(one) is int and one >= 0 for one in found):
        raise InputError("a prompt is no list of token ids: without a rollout function, prompts are", field="prompts")
    return found


def _json_value(prompt: Any) -> Any:
    try:
        return json.loads(json.dumps(prompt))
    except (TypeError, ValueError) as error:
        raise InputError(f"a prompt for the rollout function is no JSON value: {error}", field="prompts") from error
