"""Whole episodes: a real environment in its process, a real replica, and the rollout function between them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from tests.environments.servers import RunningEnvironment, running_environment
from tests.serving.model_chains import ModelChain, make_chain
from tests.serving.servers import RunningReplica, running_replica
from weightline.environments.word_game import (
    MAX_GUESSES,
    URL_VARIABLE,
    WORD_LENGTH,
    Game,
    answer_to,
    decode_bytes,
    encode_bytes,
    game_seed,
    play,
    play_game,
)
from weightline.rollouts.fleet import ReplicaFleet
from weightline.rollouts.producer import Producer
from weightline.rollouts.sample import Sample, Span
from weightline.rollouts.sampling import Sampling

pytestmark = pytest.mark.process

PROMPTS = ["game 1:", "game 1:", "game 2:", "game 2:"]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningEnvironment]:
    with running_environment(tmp_path_factory.mktemp("environment") / "log") as running:
        yield running


@pytest.fixture
def made(tmp_path: Path, environment: RunningEnvironment, monkeypatch: pytest.MonkeyPatch) -> ModelChain:
    monkeypatch.setenv(URL_VARIABLE, environment.url)
    return make_chain((tmp_path / "bucket").as_uri())


@pytest.fixture
def replica(made: ModelChain, tmp_path: Path) -> Iterator[RunningReplica]:
    with running_replica(made.chain, tmp_path / "replica", "one", version=0) as running:
        yield running


def _episodes(made: ModelChain, replica: RunningReplica, prompts: list[str], play: Any) -> tuple[Sample, ...]:
    fleet = ReplicaFleet(made.chain.url, [replica.url])
    with Producer(fleet, Sampling(n=2, max_tokens=64), seed=5, play=play, max_attempts=1) as producer:
        return producer.take(0, prompts).samples


def _at_observation(number: int, act: Callable[[], object]) -> Any:
    """The rollout function of the game, but `act` is called when something is observed for that time."""
    num_observed = 0

    def encode(text: str) -> list[int]:
        nonlocal num_observed
        num_observed += text.endswith("\n")
        if num_observed == number and text.endswith("\n"):
            act()
        return encode_bytes(text)

    async def playing(session: Any, prompt: str) -> None:
        await play_game(session, prompt, encode=encode, decode=decode_bytes)

    return playing


def _assert_is_a_game(sample: Sample, prompt: str) -> None:
    """Turns of the model and answers of the environment take turns; only the model's tokens are trained on."""
    assert sample.mask is not None
    assert decode_bytes(sample.prompt_ids) == prompt
    game, said = Game.of_seed(game_seed(prompt)), ""
    for is_written, marked in groupby(zip(sample.mask, sample.token_ids, strict=True), lambda one: one[0]):
        text = decode_bytes([token for _, token in marked])
        if is_written:
            assert len(text) <= WORD_LENGTH
            game, said = game.after(text), answer_to(game, text)
        else:
            assert text == said
    assert game.is_over
    assert sample.mask[-1]
    assert sample.fields == {
        "reward": pytest.approx(game.best / WORD_LENGTH),
        "num_guesses": game.num_guesses,
        "is_solved": game.is_solved,
    }
    assert all(logprob == 0 for logprob, is_written in zip(sample.logprobs, sample.mask, strict=True) if not is_written)


def test_episodes_go_on_when_the_environment_is_killed(
    made: ModelChain, replica: RunningReplica, environment: RunningEnvironment
) -> None:
    """One attempt must do for each episode: none begins again, and all end as they do undisturbed."""

    def kill_and_restart() -> None:
        environment.kill()
        environment.restart()

    undisturbed = _episodes(made, replica, PROMPTS, play)
    for sample, prompt in zip(undisturbed, PROMPTS, strict=True):
        _assert_is_a_game(sample, prompt)
        assert sample.spans == (Span(0, sample.num_written),)
    assert len({sample.token_ids for sample in undisturbed}) == len(PROMPTS)
    assert _episodes(made, replica, PROMPTS, _at_observation(5, kill_and_restart)) == undisturbed


def test_each_turn_has_the_version_that_wrote_it(made: ModelChain, replica: RunningReplica) -> None:
    made.grow()
    (sample,) = _episodes(made, replica, PROMPTS[:1], _at_observation(2, lambda: replica.replica.refresh(1)))
    _assert_is_a_game(sample, PROMPTS[0])
    assert sample.fields["num_guesses"] == MAX_GUESSES
    assert [span.version for span in sample.spans] == [0, 1]
    assert sample.spans[0].num_tokens <= 2 * WORD_LENGTH
    assert sum(span.num_tokens for span in sample.spans) == sample.num_written
