"""The rollouts of one training: requests ahead of time, samples on time, and what is noted and saved of them.

All ranks call the same methods in the same order. Each rank asks for its own prompts. What they have to agree on, and
an error of any of them, goes through the session's group.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers import TrainerState, TrainingArguments

from weightline.chain.read.records import SAMPLES
from weightline.files import write_atomically
from weightline.rollouts.batch import Taken
from weightline.rollouts.client import Mixing
from weightline.rollouts.episode import Play
from weightline.rollouts.fleet import ReplicaFleet
from weightline.rollouts.producer import Producer
from weightline.rollouts.push import Pusher
from weightline.rollouts.record import Completion, Group, record_name
from weightline.rollouts.sample import Sample
from weightline.rollouts.staleness import Lineage, StalenessRule
from weightline.stages.rollout_report import (
    BatchReport,
    ages_of,
    over_batches,
    over_ranks,
    record_of,
)
from weightline.stages.rollout_state import micro_steps_of_batch
from weightline.stages.trl_names import sampling_of
from weightline.trainer.session import PublishSession


@dataclass(frozen=True, slots=True)
class RolloutSettings:
    """Settings of `ChainRollouts`, checked."""

    chain_url: str
    rule: StalenessRule
    urls: tuple[str, ...] | None
    mixing: Mixing
    deadline_seconds: float
    tokens: Mapping[str, str]
    """The token of each named replica to which new versions are pushed, by its URL."""
    play: Play | None
    """A rollout function; None for one completion for each prompt."""


class RolloutRun:
    """From the start of a training to its end, on one rank."""

    def __init__(self, trainer: Any, session: PublishSession, settings: RolloutSettings) -> None:
        self._trainer, self._session, self._rule = trainer, session, settings.rule
        args, state = trainer.args, trainer.state
        saved = _read(_path(args, state)) if state.global_step > 0 else None
        before = Lineage() if saved is None else Lineage.from_json(saved["lineage"])
        self._lineage = before.started_at(session.start_version, session.stands_for)
        batches_a_step = max(1, args.gradient_accumulation_steps // micro_steps_of_batch(trainer))
        self._producer = Producer(
            ReplicaFleet(settings.chain_url, settings.urls, mixing=settings.mixing, turn=args.process_index),
            sampling_of(trainer, trainer.num_generations),
            seed=args.seed, rank=args.process_index, deadline_seconds=settings.deadline_seconds, play=settings.play,
            max_batches=settings.rule.lookahead + batches_a_step + 1,
        )  # fmt: skip
        self._pusher: Pusher | None = None
        if session.group.rank == 0:
            self._pusher = Pusher(settings.chain_url, settings.tokens)
            session.on_committed(self._pusher.committed)
            self._pusher.committed(session.start_version)
        if saved is not None:
            self._producer.restore(saved["batches"])
        self._reports: list[BatchReport] = []
        self._samples: Sequence[Sample] = ()
        self._last_batch: int | None = None
        self._num_further = 0

    def request(self, number: int, batch: Sequence[Mapping[str, Any]]) -> None:
        """Asks for the samples of a generation batch, whose rows are given. Safe to repeat."""
        trainer = self._trainer
        if trainer.environment_factories is not None:
            return  # its prompts are written when the batch is needed
        prompts = [row["prompt"] for row in batch]
        if trainer.rollout_func is None:
            prompts = trainer._tokenize_prompts(prompts)[0]
        every, accumulation = micro_steps_of_batch(trainer), trainer.args.gradient_accumulation_steps
        steps_until = (number * every - trainer._step) // accumulation
        min_version = self._rule.min_version(self._version_in(steps_until), self._lineage)
        self._producer.request(number, prompts, min_version)

    def take(self, prompts: list[Any], num_generations: int) -> Sequence[Sample]:
        """Returns a sample for each prompt, each of which stands there as often as it has samples.

        In training these are the samples of the generation batch that begins now. What TRL asks for after that, in the
        turns of its tool loop, and all of an evaluation is generated at once. Collective, except with tools: only some
        ranks may have further turns.
        """
        trainer, newest = self._trainer, self._session.present_version
        is_training = trainer.model.training
        is_first = is_training and self._number() != self._last_batch
        is_collective = not self._session.is_closed and (is_first or not trainer.tools)
        group = self._session.group
        if is_first:
            self._last_batch, self._num_further = self._number(), 0
        make = partial(self._take_batch if is_first else self._generate, prompts, num_generations, newest)
        taken = group.on_all(make) if is_collective else make()
        report = _report(taken, newest, self._lineage)
        if is_collective:
            parts = group.gather_to_first(report)
            report = group.from_first(over_ranks(parts) if parts else None)
        for name, value in report.metrics.items():
            trainer._metrics["train" if is_training else "eval"][name].append(value)
        if is_first:
            self._reports.append(report)
            self._samples = taken.samples
        return taken.samples

    def _number(self) -> int:
        """Returns the number of the generation batch that training is at."""
        return int(self._trainer._step // micro_steps_of_batch(self._trainer))

    def _take_batch(self, prompts: list[Any], num_generations: int, newest: int) -> Taken:
        return self._producer.take(
            self._number(), prompts, lambda sample: self._rule.is_fresh(sample, newest, self._lineage),
            self._rule.min_version(newest, self._lineage),
        )  # fmt: skip

    def _generate(self, prompts: list[Any], num_generations: int, newest: int) -> Taken:
        """Returns samples of prompts that could not be asked for ahead: in an evaluation, by the newest version."""
        trainer = self._trainer
        is_training = trainer.model.training
        self._num_further += 1
        what = f"batch {self._number()}" if is_training else f"evaluation at step {trainer.state.global_step}"
        return self._producer.generate(
            prompts, min_version=self._rule.min_version(newest, self._lineage) if is_training else newest,
            key=f"{what}, request {self._num_further}", sampling=sampling_of(trainer, num_generations),
        )  # fmt: skip

    def note(self, global_step: int) -> None:
        """Gives the session the record of what the optimizer step was trained on. Only rank 0 writes it."""
        reports, self._reports = self._reports, []
        if not reports or self._session.group.rank != 0:
            return
        groups = groups_of(self._trainer, self._samples)
        record = record_of(over_batches(reports), groups, global_step, self._trainer._metrics["train"])
        name = record_name(self._session.settings.stage, global_step)
        self._session.note(SAMPLES, name, record.to_record())

    def save(self, args: TrainingArguments, state: TrainerState) -> None:
        """Saves the batches that were asked for and not yet used. Waits for those that are being made."""
        body = {"lineage": self._lineage.to_json(), "batches": self._producer.snapshot()}
        write_atomically(_path(args, state), json.dumps(body), is_durable=False)

    def close(self) -> None:
        """Ends the threads of the producer and of the pusher, and their connections."""
        self._producer.close()
        if self._pusher is not None:
            self._pusher.close()

    def _version_in(self, num_steps: int) -> int:
        """Returns the number of the version some optimizer steps from now, if no checkpoint adds another one."""
        step, sync_steps = self._trainer.state.global_step, self._session.settings.sync_steps
        return self._session.present_version + (step + num_steps) // sync_steps - step // sync_steps


def _report(taken: Taken, newest: int, lineage: Lineage) -> BatchReport:
    return BatchReport(
        ages=ages_of(taken.samples, newest, lineage),
        made_by=Counter(min(sample.versions) for sample in taken.samples if sample.versions),
        replicas={name: (share.num_samples, share.seconds) for name, share in taken.replicas.items()},
        wait_seconds=taken.wait_seconds,
        generate_seconds=taken.generate_seconds,
        num_regenerated=taken.num_regenerated,
        num_mixed=taken.num_mixed,
        queue_length=taken.queue_length,
    )


def groups_of(trainer: Any, samples: Sequence[Sample]) -> list[Group]:
    """Returns rank 0's groups of the newest generation batch, as TRL logged them. For rank 0.

    TRL keeps the newest batch of all ranks in `_logs`, rank 0 first.
    """
    logs, n = trainer._logs, trainer.num_generations
    prompts, completions = list(logs["prompt"])[: len(samples)], list(logs["completion"])[: len(samples)]
    rewards = [list(logs["rewards"][name])[: len(samples)] for name in trainer.reward_func_names]
    weights = trainer.reward_weights.tolist()
    found = [
        Completion(
            _text(completion),
            _weighted([values[at] for values in rewards], weights),
            sample.spans,
        )
        for at, (completion, sample) in enumerate(zip(completions, samples, strict=True))
    ]
    return [Group(_text(prompts[at]), tuple(found[at : at + n])) for at in range(0, len(found), n)]


def _weighted(values: Sequence[float], weights: Sequence[float]) -> float | None:
    """Returns the reward as TRL sums it: functions that gave none are left out. None when all of them gave none."""
    known = [weight * value for weight, value in zip(weights, values, strict=True) if math.isfinite(value)]
    return sum(known) if known else None


def _text(messages: Any) -> str:
    """Returns a prompt or completion as one text."""
    if isinstance(messages, str):
        return messages
    return "\n".join(f"{message.get('role')}: {message.get('content')}" for message in messages)


def _path(args: TrainingArguments, state: TrainerState) -> Path:
    folder = Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"
    return folder / f"rollouts-{args.process_index}-of-{args.world_size}.json"


def _read(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    saved: dict[str, Any] = json.loads(path.read_bytes())
    return saved
