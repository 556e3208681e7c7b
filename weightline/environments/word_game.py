"""The built-in environment: a hidden word is found by guesses over several turns. Deterministic by its seed.

A word has three letters of `abcd`. The environment answers each guess with one mark a letter: `+` in its place, `-`
elsewhere in the word, `.` not in the word, `?` no letter of the game. An episode ends with the word, or after five
guesses. The reward is the largest share of letters in their places that any guess reached; each turn earns what it adds
to it. So a model that writes random letters earns something, and one that reads the marks earns everything.

`play` is the rollout function of a GRPO stage, and `reward` its reward function:

    dataset: {path: word-game.jsonl}
    reward: weightline.environments.word_game:reward
    rollouts: {rollout: "weightline.environments.word_game:play"}

They know the environment by WEIGHTLINE_ENVIRONMENT_URL. A prompt is `game 17:`; its text is the seed, so all samples
of a prompt play for the same word. Text and tokens are bytes, as the built-in model has them. For another tokenizer,
write a function of your own that calls `play_game` with its `encode` and `decode`.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from weightline.environments import WORD_GAME
from weightline.environments.remote import RemoteEnvironment
from weightline.rollouts.sampling import seed_of

if TYPE_CHECKING:
    from weightline.rollouts.episode import Session

LETTERS = "abcd"
WORD_LENGTH = 3
MAX_GUESSES = 5
MAX_GUESS_CHARACTERS = 64
URL_VARIABLE = "WEIGHTLINE_ENVIRONMENT_URL"
#: Sent as `Authorization: Bearer`: a private Space of the Hugging Face Hub asks for the token of a reader.
TOKEN_VARIABLE = "WEIGHTLINE_ENVIRONMENT_TOKEN"  # noqa: S105 - the name of a variable
DEFAULT_URL = "http://127.0.0.1:8010"
_NUM_BYTE_TOKENS = 256


@dataclass(frozen=True, slots=True)
class Game:
    """A position in the game."""

    word: str
    num_guesses: int = 0
    best: int = 0
    """Letters in their places, in the best guess so far."""

    @classmethod
    def of_seed(cls, seed: int) -> Game:
        """Returns the start of the game of a seed. Pure."""
        return cls("".join(random.Random(f"{WORD_GAME}/{seed}").choices(LETTERS, k=WORD_LENGTH)))

    @property
    def is_solved(self) -> bool:
        """Whether a guess was the word."""
        return self.best == WORD_LENGTH

    @property
    def is_over(self) -> bool:
        """Whether no guess is left to make."""
        return self.is_solved or self.num_guesses >= MAX_GUESSES

    def after(self, guess: str) -> Game:
        """Returns the position after a guess, of which the first letters count. Pure."""
        return Game(self.word, self.num_guesses + 1, max(self.best, marks(self.word, guess).count("+")))


def marks(word: str, guess: str) -> str:
    """Returns one mark for each letter of the word, as the module describes them. Pure."""
    found = []
    for place, letter in enumerate(word):
        guessed = guess[place : place + 1]
        if guessed == letter:
            found.append("+")
        elif not guessed or guessed not in LETTERS:
            found.append("?")
        else:
            found.append("-" if guessed in word else ".")
    return "".join(found)


def answer_to(game: Game, guess: str) -> str:
    """Returns the text that the environment answers to a guess. Pure."""
    return f"{marks(game.word, guess)}\n"


def prompt_of(number: int) -> str:
    """Returns the prompt of a numbered game."""
    return f"game {number}:"


def prompts(num_games: int, first: int = 0) -> list[dict[str, str]]:
    """Returns rows for a dataset of GRPO."""
    return [{"prompt": prompt_of(number)} for number in range(first, first + num_games)]


def transcripts(num_games: int, seed: int = 0) -> Iterator[dict[str, str]]:
    """Yields rows for SFT: whole games of a player that keeps what is in its place and never repeats a wrong letter."""
    draw = random.Random(f"{WORD_GAME}/transcripts/{seed}")
    for number in range(num_games):
        # Numbers of their own: no game of `prompts` is shown.
        prompt = prompt_of(1_000_000 + seed * num_games + number)
        game, written = Game.of_seed(game_seed(prompt)), ""
        candidates = [set(LETTERS) for _ in range(WORD_LENGTH)]
        while not game.is_over:
            guess = "".join(draw.choice(sorted(letters)) for letters in candidates)
            marked = answer_to(game, guess)
            written += guess if marked.startswith("+" * WORD_LENGTH) else guess + marked
            for place, mark in enumerate(marked.strip()):
                candidates[place] = {guess[place]} if mark == "+" else candidates[place] - {guess[place]}
            game = game.after(guess)
        yield {"prompt": prompt, "completion": written}


def game_seed(prompt: str) -> int:
    """Returns the seed of the game that a prompt begins. Pure."""
    return seed_of(WORD_GAME, prompt) % 2**31


async def play(session: Session, prompt: Any) -> None:
    """Plays one game: a rollout function for a model whose tokens are bytes. The module describes the variables."""
    await play_game(session, prompt, encode=encode_bytes, decode=decode_bytes)


async def play_game(
    session: Session, prompt: Any, *, encode: Callable[[str], list[int]], decode: Callable[[Sequence[int]], str]
) -> None:
    """Plays the game of a prompt, which is a text, its token ids, or a row with the column `prompt`.

    The model writes the guesses. What the environment answers is observed, so it is masked in training. `fields` of the
    session get `reward`, `num_guesses` and `is_solved`. RolloutError when the environment stays away.
    """
    given = prompt["prompt"] if isinstance(prompt, Mapping) else prompt
    text = given if isinstance(given, str) else decode(given)
    context: list[int] | None = encode(text) if isinstance(given, str) else list(given)
    total = 0.0
    async with RemoteEnvironment(environment_url(), headers=environment_headers()) as environment:
        step = await environment.reset(game_seed(text))
        while not step.is_done:
            turn = await session.generate(context, max_tokens=WORD_LENGTH)
            context = None
            step = await environment.step({"guess": decode(turn.token_ids)[:MAX_GUESS_CHARACTERS]})
            total += step.reward or 0.0
            if not step.is_done:
                session.observe(encode(str(step.observation["text"])))
        facts = {name: step.observation[name] for name in ("num_guesses", "is_solved")}
    session.fields.update({"reward": total} | facts)


def reward(completions: Sequence[Any], **columns: Any) -> list[float]:
    """Returns the reward of each episode, which its rollout function has put into the fields: for TRL."""
    rewards = [float(one) for one in columns["reward"]]
    if len(rewards) != len(completions):
        raise ValueError(f"{len(completions)} completions have {len(rewards)} rewards")
    return rewards


def environment_url() -> str:
    """Returns the URL of the environment."""
    return os.environ.get(URL_VARIABLE) or DEFAULT_URL


def environment_headers() -> dict[str, str]:
    """Returns the headers with which a connection to the environment is opened."""
    token = os.environ.get(TOKEN_VARIABLE)
    return {"Authorization": f"Bearer {token}"} if token else {}


def encode_bytes(text: str) -> list[int]:
    """Returns the tokens of a text for a model whose tokens are bytes. Pure."""
    return list(text.encode())


def decode_bytes(token_ids: Sequence[int]) -> str:
    """Returns the text of such tokens; a special token is left out, and so is what is no UTF-8. Pure."""
    return bytes(token for token in token_ids if token < _NUM_BYTE_TOKENS).decode(errors="replace")
