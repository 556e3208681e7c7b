"""The rules of the word game, its texts, and what a rollout function leaves in an episode."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest

from weightline.environments.word_game import (
    LETTERS,
    MAX_GUESSES,
    WORD_LENGTH,
    Game,
    answer_to,
    decode_bytes,
    encode_bytes,
    game_seed,
    marks,
    prompts,
    reward,
    transcripts,
)


@pytest.mark.parametrize(
    ("word", "guess", "expected"),
    [
        ("abc", "abc", "+++"),
        ("abc", "bca", "---"),
        ("abc", "ddd", "..."),
        ("abc", "acd", "+-."),
        ("aab", "baa", "-+-"),
        ("abc", "a", "+??"),
        ("abc", "", "???"),
        ("abc", "xbz", "?+?"),
        ("abc", "abcd", "+++"),
        ("abc", "\ufffd+\n", "???"),
    ],
)
def test_marks(word: str, guess: str, expected: str) -> None:
    assert marks(word, guess) == expected


def test_a_seed_names_one_word_and_all_words_occur() -> None:
    words = [Game.of_seed(seed).word for seed in range(2000)]
    assert words == [Game.of_seed(seed).word for seed in range(2000)]
    assert set(words) == {"".join(letters) for letters in itertools.product(LETTERS, repeat=WORD_LENGTH)}


def test_turns_earn_what_they_add_to_the_best_guess() -> None:
    game, earned = Game("abc"), []
    for guess in ("add", "bad", "abd"):
        after = game.after(guess)
        earned.append(after.best - game.best)
        game = after
    assert earned == [1, 0, 1]
    assert (game.is_solved, game.is_over) == (False, False)
    game = game.after("abc")
    assert (game.best, game.is_solved, game.is_over, game.num_guesses) == (3, True, True, 4)


def test_a_game_ends_with_the_last_guess() -> None:
    game = Game("abc")
    for number in range(MAX_GUESSES):
        assert not game.is_over, number
        game = game.after("ddd")
    assert (game.is_over, game.is_solved, game.best) == (True, False, 0)


def test_transcripts_are_games_of_their_own_and_mostly_won() -> None:
    rows = list(transcripts(200, seed=3))
    assert rows == list(transcripts(200, seed=3))
    assert not {row["prompt"] for row in rows} & {row["prompt"] for row in prompts(10_000)}
    num_solved = 0
    for row in rows:
        game, rest = Game.of_seed(game_seed(row["prompt"])), row["completion"]
        while rest:
            guess, rest = rest[:WORD_LENGTH], rest[WORD_LENGTH:]
            told = answer_to(game, guess)
            game = game.after(guess)
            if not game.is_solved:
                assert rest.startswith(told), row
                rest = rest[len(told) :]
        assert game.is_over, row
        num_solved += game.is_solved
    assert num_solved > 150


def test_texts_of_bytes_survive_what_a_model_may_write() -> None:
    assert decode_bytes(encode_bytes("game 17:")) == "game 17:"
    assert decode_bytes([97, 256, 98, 257]) == "ab"
    assert decode_bytes([0xFF, 97]) == "\ufffda"


@pytest.mark.parametrize("completions", [["x"], [[1, 2, 3]]])
def test_the_reward_is_that_of_the_episode(completions: Sequence[object]) -> None:
    assert reward(completions, reward=[1 / 3], is_solved=[False]) == [1 / 3]
    with pytest.raises(ValueError, match="2 rewards"):
        reward(completions, reward=[0.0, 1.0])
