"""GRPO whose completions come from replicas that follow the chain, for TRL's GRPOTrainer as it is.

    trainer = GRPOTrainer(...)
    trainer.add_callback(WeightlineCallback(url))
    ChainRollouts(url, staleness=2).attach(trainer)

TRL generates with vLLM through an object that it calls once a generation batch. Here that object hands over completions
that replicas made ahead of time. The chain brings the weights to the replicas, so nothing is gathered for them.
"""

from __future__ import annotations

import importlib
import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from weightline.chain import open_chain
from weightline.errors import InputError
from weightline.extras import requires
from weightline.rollouts.client import Mixing
from weightline.rollouts.episode import Play
from weightline.rollouts.staleness import StalenessRule
from weightline.serving.http.auth import TOKEN_VARIABLE
from weightline.stages.trl_names import require_names, require_settings

with requires("train"):
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

    from weightline.stages.rollout_run import RolloutRun, RolloutSettings
    from weightline.stages.rollout_state import GenerationStateCallback, micro_steps_of_batch
    from weightline.trainer.callback import WeightlineCallback


class ChainRollouts:
    """Settings of rollouts from the replicas of a chain, for one trainer."""

    def __init__(
        self,
        chain_url: str,
        *,
        staleness: int = 2,
        lookahead: int = 1,
        replicas: str | Sequence[str] = "follow",
        mixing: Mixing = "deny",
        deadline_seconds: float = 600.0,
        rollout: str | Play | None = None,
        tokens: Mapping[str, str] | None = None,
    ) -> None:
        """Checks the settings.

        Args:
            chain_url: The chain that the trainer's WeightlineCallback commits to.
            staleness: Greatest age, in versions, of the weights that wrote a completion, when it is trained on. 0 is
                exactly on policy. Default: 2.
            lookahead: Generation batches that are asked for before training needs them. Default: 1.
            replicas: follow (the default): those that have a lease in the bucket, also such as join later. Or their
                URLs.
            mixing: allow: a completion may go on while its replica moves to another version. Default: deny.
            deadline_seconds: Longest wait for a completion, after which training fails with the state of every replica.
                Default: 600.
            rollout: A function that plays an episode of several turns, or its module:function: see
                `weightline.rollouts.episode`. Default: one completion for each prompt.
            tokens: The token of each named replica, by its URL: rank 0 pushes each version to it. Default: that of
                WEIGHTLINE_TOKEN for all of them, if it is set.

        Raises:
            InputError: A setting is invalid, or the URL's scheme is not supported.
        """
        if mixing not in ("deny", "allow"):
            raise InputError(f"mixing is {mixing!r}: name deny or allow", field="mixing")
        if not deadline_seconds > 0:
            raise InputError(f"deadline_seconds is {deadline_seconds:g}: name a time above 0", field="deadline_seconds")
        if replicas != "follow" and (isinstance(replicas, str) or not replicas):
            raise InputError(f"replicas is {replicas!r}: name follow, or a list of URLs", field="replicas")
        self.settings = RolloutSettings(
            chain_url=open_chain(chain_url).url, rule=StalenessRule(lookahead, staleness),
            urls=None if replicas == "follow" else tuple(replicas), mixing=mixing, deadline_seconds=deadline_seconds,
            tokens=_tokens(replicas) if tokens is None else tokens,
            play=load_play(rollout) if isinstance(rollout, str) else rollout,
        )  # fmt: skip

    def attach(self, trainer: Any) -> None:
        """Makes the trainer take its completions from the replicas. Call it once, before `trainer.train()`.

        InputError for a trainer that lacks what this needs of TRL, or whose settings do not go with it.
        """
        require_names(trainer)
        require_settings(trainer, self.settings.rule.lookahead)
        hook = RolloutHook(trainer, self.settings)
        # What TRL's correction by importance sampling depends on. TRL then generates through `vllm_generation` only.
        trainer.use_vllm, trainer.vllm_mode, trainer._last_loaded_step = True, "server", -1
        trainer.vllm_generation = hook
        trainer.get_batch_samples = hook.get_batch_samples
        if self.settings.play is not None:
            trainer.rollout_func = hook.play
        trainer.add_callback(GenerationStateCallback(trainer))
        trainer.add_callback(hook)


class RolloutHook(TrainerCallback):
    """Stands in the place of TRL's VLLMGeneration, hears of the training's events, and reads the data ahead."""

    def __init__(self, trainer: Any, settings: RolloutSettings) -> None:
        self._trainer, self._settings = trainer, settings
        self._ahead: deque[list[Any]] = deque()
        self._iterator: Iterator[Any] | None = None
        self._num_fetched = 0
        self._run: RolloutRun | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Checks the callback that publishes. Forgets an earlier training of this process."""
        self._end()
        require_publishing(self._publishing(), self._settings)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Notes what the step was trained on. The session writes it beside the version that the weights become."""
        if self._run is not None:
            self._run.note(state.global_step)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Saves the batches that are finished or under way with the checkpoint."""
        if self._run is not None:
            self._run.save(args, state)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._end()

    def sync_weights(self) -> None:
        """Does nothing: the chain brings the weights to the replicas. TRL calls it after each optimizer step."""

    def generate(
        self, prompts: list[list[int]], images: Any, num_generations: int, profiler: Any = None
    ) -> tuple[list[list[int]], list[list[int]], list[list[list[float]]], None]:
        """Returns what TRL's VLLMGeneration returns: prompts, completions, and a list of logprobs for each token."""
        if images is not None:
            raise InputError("rollouts from replicas take prompts of text only", field="images")
        samples = self._started().take(prompts, num_generations)
        logprobs = [[[one] for one in sample.logprobs] for sample in samples]
        return prompts, [list(sample.token_ids) for sample in samples], logprobs, None

    def play(self, prompts: list[Any], trainer: Any) -> dict[str, list[Any]]:
        """Returns what TRL asks of a `rollout_func`: episodes, with the tokens marked that the model wrote."""
        is_training = trainer.model.training
        num_generations = trainer.num_generations if is_training else trainer.num_generations_eval
        samples = self._started().take(prompts, num_generations)
        names = set.intersection(*(set(sample.fields) for sample in samples))
        return {
            "prompt_ids": [list(sample.prompt_ids) for sample in samples],
            "completion_ids": [list(sample.token_ids) for sample in samples],
            "logprobs": [list(sample.logprobs) for sample in samples],
            "env_mask": [[int(one) for one in sample.mask or (True,) * len(sample.token_ids)] for sample in samples],
            **{name: [sample.fields[name] for sample in samples] for name in sorted(names)},
        }

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: Any) -> tuple[list[Any], Any]:
        """Returns the micro-batches of an optimizer step, as Trainer's method does, and reads the data ahead of it.

        The first micro-batch of each generation batch that is read is a request to the replicas.
        """
        run, every = self._started(), micro_steps_of_batch(self._trainer)
        if epoch_iterator is not self._iterator:
            self._iterator, self._num_fetched = epoch_iterator, self._trainer._step
            self._ahead.clear()
        while len(self._ahead) < num_batches + self._settings.rule.lookahead * every:
            batch = next(epoch_iterator, None)
            if batch is None:
                break
            if self._num_fetched % every == 0:
                run.request(self._num_fetched // every, batch)
            self._ahead.append(batch)
            self._num_fetched += 1
        taken = [self._ahead.popleft() for _ in range(min(num_batches, len(self._ahead)))]
        return taken, self._trainer._get_num_items_in_batch(taken, device)

    def _started(self) -> RolloutRun:
        """Returns the run of this training, which begins when the session has begun. Collective when it begins."""
        if self._run is None:
            session = self._publishing().session
            if session is None:
                raise InputError("no training is under way: call trainer.train()", field="trainer")
            self._run = RolloutRun(self._trainer, session, self._settings)
        return self._run

    def _publishing(self) -> WeightlineCallback:
        for callback in self._trainer.callback_handler.callbacks:
            if isinstance(callback, WeightlineCallback):
                return callback
        raise InputError(
            "the replicas get their weights from the chain, and nothing writes it: "
            f"trainer.add_callback(WeightlineCallback({self._settings.chain_url!r}))",
            field="callbacks",
        )

    def _end(self) -> None:
        run, self._run = self._run, None
        self._iterator = None
        self._ahead.clear()
        if run is not None:
            run.close()


def _tokens(replicas: str | Sequence[str]) -> dict[str, str]:
    """Returns the environment's token for every replica that is named."""
    token = os.environ.get(TOKEN_VARIABLE)
    return dict.fromkeys(replicas, token) if token and not isinstance(replicas, str) else {}


def load_play(path: str) -> Play:
    """Returns the rollout function `module:function`. InputError when it cannot be imported."""
    module, _, name = path.partition(":")
    try:
        play: Play = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        message = f"the rollout function {path!r} cannot be imported: {error}"
        raise InputError(f"{message}. Name it as module:function that all ranks can import", field="rollout") from error
    return play


def require_publishing(callback: WeightlineCallback, settings: RolloutSettings) -> None:
    """Raises InputError when the callback's versions cannot be those that the samples are judged by."""
    published = callback.settings
    for field, is_wrong, remedy in (
        ("chain_url", callback.chain.url != settings.chain_url,
         f"the callback commits to {callback.chain.url}, rollouts follow {settings.chain_url}: name one chain"),
        ("on_backlog", published.on_backlog != "wait", "wait, so that every sync is a version"),
        ("on_publish_error", published.on_publish_error != "stop", "stop, so that every sync is a version"),
        ("sync_steps", settings.rule.staleness == 0 and published.sync_steps > 1,
         "1, or a staleness of at least 1: between two versions training moves away from the newest"),
        ("deadline_seconds", settings.deadline_seconds >= published.timeout_seconds,
         f"less than the callback's timeout_seconds ({published.timeout_seconds:g}), after which ranks give up"),
    ):  # fmt: skip
        if is_wrong:
            raise InputError(f"{field} does not go with rollouts from replicas: {remedy}", field=field)
