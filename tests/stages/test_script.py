"""A script of a person's own: GRPOTrainer and three lines more, without a recipe, a launcher or Prefect."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.serving.servers import TOKEN, running_replica
from tests.stages.test_attach import grpo_trainer
from weightline import ChainRollouts, WeightlineCallback, open_chain
from weightline.chain.read.records import SAMPLES, read_records
from weightline.errors import WeightlineError
from weightline.rollouts.record import parse_samples
from weightline.serving.replica.following import Following
from weightline.stages.model import materialize_model
from weightline.stages.recipe import ModelConfig, TinyModelConfig

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")  # TRL's own


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tiny = TinyModelConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1, head_dim=16)
    return materialize_model(ModelConfig(tiny=tiny), tmp_path_factory.mktemp("model"), 0, "float32")


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    """A chain that a replica follows. It is found by its lease."""
    url = f"file://{tmp_path}/bucket/chain"
    with running_replica(open_chain(url), tmp_path / "replica", "replica-0", following=Following(0.05)):
        yield url


def _numbers(trainer: Any, name: str) -> list[float]:
    return [line[name] for line in trainer.state.log_history if name in line]


def test_three_lines_let_replicas_generate(url: str, model_dir: Path, tmp_path: Path) -> None:
    options = {"max_steps": 4, "logging_steps": 1, "eval_strategy": "steps", "eval_steps": 2}
    trainer = grpo_trainer(model_dir, tmp_path, **options)
    trainer.add_callback(WeightlineCallback(url))
    ChainRollouts(url, staleness=1).attach(trainer)
    trainer.train()
    chain = open_chain(url)
    assert chain.tip_version() == 4
    assert max(_numbers(trainer, "rollout/staleness_max")) <= 1
    assert len(_numbers(trainer, "rollout/staleness_max")) == 4
    # An evaluation is of the weights at hand, whatever was made ahead.
    assert _numbers(trainer, "eval_rollout/staleness_max") == [0.0, 0.0]
    assert max(_numbers(trainer, "eval_sampling/sampling_logp_difference/max")) < 1e-4
    found = [parse_samples(record) for record in read_records(chain, SAMPLES)]
    assert [(one.global_step, one.num_samples) for one in found] == [(step, 4) for step in range(1, 5)]
    assert {name for one in found for name in one.replicas} == {"replica-0"}


def test_a_replica_whose_token_is_known_is_told_of_each_version(model_dir: Path, tmp_path: Path) -> None:
    """It looks for versions itself once an hour."""
    url = f"file://{tmp_path}/bucket/chain"
    trainer = grpo_trainer(model_dir, tmp_path)
    trainer.add_callback(WeightlineCallback(url))
    with running_replica(open_chain(url), tmp_path / "replica", "replica-0", following=Following(3600)) as replica:
        ChainRollouts(url, lookahead=0, staleness=0, replicas=[replica.url], tokens={replica.url: TOKEN}).attach(
            trainer
        )
        trainer.train()
    assert [parse_samples(record).made_by for record in read_records(open_chain(url), SAMPLES)] == [{0: 4}, {1: 4}]


def _prompts_seen(trainer: Any) -> list[list[str]]:
    """Notes the prompts of every generation batch, from now on."""
    seen: list[list[str]] = []

    def noting(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        seen.append(prompts)
        return [float(len(completion)) for completion in completions]

    trainer.reward_funcs, trainer.reward_func_names = [noting], ["noting"]
    return seen


@pytest.mark.parametrize(
    ("options", "staleness"),
    [
        ({"gradient_accumulation_steps": 3}, 2),
        ({"gradient_accumulation_steps": 2, "steps_per_generation": 1}, 1),
        ({"steps_per_generation": 2, "num_iterations": 2}, 4),
        ({"gradient_accumulation_steps": 2, "num_iterations": 3}, 6),
    ],
    ids=["one batch a step", "two batches a step", "one batch for four steps", "one batch for three steps"],
)
def test_prompts_come_in_the_order_of_trl(
    options: dict[str, Any], staleness: int, url: str, model_dir: Path, tmp_path: Path
) -> None:
    """Over the end of an epoch, too: there are sixteen prompts."""
    options = {"max_steps": 7, "save_strategy": "no", **options}
    plain = grpo_trainer(model_dir, tmp_path, **options)
    expected = _prompts_seen(plain)
    plain.train()
    trainer = grpo_trainer(model_dir, tmp_path, **options)
    seen = _prompts_seen(trainer)
    trainer.add_callback(WeightlineCallback(url))
    ChainRollouts(url, staleness=staleness, lookahead=2).attach(trainer)
    trainer.train()
    assert seen == expected
    assert len(seen) > 1


def test_a_turn_of_tools_is_generated_at_once_and_without_the_other_ranks(
    url: str, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = grpo_trainer(model_dir, tmp_path)
    callback = WeightlineCallback(url)
    trainer.add_callback(callback)
    ChainRollouts(url, staleness=1).attach(trainer)
    trainer.tools = [print]  # TRL's loop runs them. Here one sample has a further turn at every batch.
    once, found = trainer._generate_single_turn, []

    def with_a_further_turn(prompt_ids: list[list[int]], *args: Any, **options: Any) -> Any:
        completion_ids, logprobs = once(prompt_ids, *args, **options)
        assert callback.session is not None
        with monkeypatch.context() as patch:
            patch.setattr(callback.session, "group", None)
            context = prompt_ids[0] + completion_ids[0] + [7]
            found.append(once([context], None, {}, num_generations=1))
        return completion_ids, logprobs

    trainer._generate_single_turn = with_a_further_turn
    trainer._tool_call_loop = lambda prompts, prompt_ids, completion_ids, completions, logprobs, *_: (
        [[1] * len(ids) for ids in completion_ids], completions, completion_ids, logprobs, 0, 0, [],
    )  # fmt: skip
    trainer.train()
    assert [(len(ids), len(logprobs)) for ids, logprobs in found] == [(1, 1), (1, 1)]
    assert [len(ids[0]) == len(logprobs[0]) for ids, logprobs in found] == [True, True]


def play(session: Any, prompt: str) -> None:
    """Two turns, of which the second one is another person's answer to what the model wrote."""
    first = session.generate(list(prompt.encode()), max_tokens=2)
    session.observe([1, 2, 3])
    second = session.generate(max_tokens=1)
    session.fields["num_written"] = len(first.token_ids) + len(second.token_ids)


def reward_of_episode(completions: list[str], num_written: list[int], **_: Any) -> list[float]:
    assert len(completions) == len(num_written)
    return [len(completion) / number for completion, number in zip(completions, num_written, strict=True)]


def test_an_episode_trains_on_the_turns_of_the_model_alone(url: str, model_dir: Path, tmp_path: Path) -> None:
    trainer = grpo_trainer(model_dir, tmp_path, logging_steps=1, max_completion_length=8)
    trainer.reward_funcs, trainer.reward_func_names = [reward_of_episode], ["reward_of_episode"]
    batches: list[dict[str, Any]] = []
    scored = trainer._generate_and_score_completions
    trainer._generate_and_score_completions = lambda inputs: batches.append(scored(inputs)) or batches[-1]
    trainer.add_callback(WeightlineCallback(url))
    ChainRollouts(url, staleness=1, rollout="tests.stages.test_script:play").attach(trainer)
    trainer.train()
    assert len(batches) == 2
    for batch in batches:
        for ids, mask, logprobs in zip(
            batch["completion_ids"].tolist(), batch["tool_mask"].tolist(), batch["sampling_per_token_logps"].tolist(),
            strict=True,
        ):  # fmt: skip
            at = ids.index(1)
            assert ids[at : at + 3] == [1, 2, 3]
            assert mask[at : at + 3] == logprobs[at : at + 3] == [0, 0, 0]
            assert mask[:at] == [1] * at
            assert mask[at + 3] == 1
            assert all(one < 0 for one in logprobs[:at])
    assert max(_numbers(trainer, "sampling/sampling_logp_difference/max")) < 0.1


def test_a_chain_without_a_replica_ends_the_training_by_name(model_dir: Path, tmp_path: Path) -> None:
    url = f"file://{tmp_path}/bucket/chain"
    trainer = grpo_trainer(model_dir, tmp_path)
    trainer.add_callback(WeightlineCallback(url))
    ChainRollouts(url, deadline_seconds=1.0).attach(trainer)
    with pytest.raises(WeightlineError, match="has a lease"):
        trainer.train()
