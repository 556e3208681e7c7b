"""Serves the built-in environment as an OpenEnv server.

A WebSocket is an episode. Their number, their idle time and the size of what they may send are bounded. There is no
login, and no state that outlives a connection.
"""

from __future__ import annotations

import socket
from typing import Any

import uvicorn
from openenv.core.env_server import Environment, create_fastapi_app
from openenv.core.env_server.types import Action, ConcurrencyConfig, Observation, State
from pydantic import Field

from weightline.environments.word_game import MAX_GUESS_CHARACTERS, Game, answer_to
from weightline.errors import InputError

MAX_MESSAGE_NBYTES = 64 * 1024
IDLE_SECONDS = 1800.0
"""A client whose session was ended repeats its episode, so this may be shorter than the longest pause of a model."""
#: Connections that are no episodes: probes, and clients that hear that all sessions are taken.
_SPARE_CONNECTIONS = 64


class GuessAction(Action):
    """One guess."""

    guess: str = Field(max_length=MAX_GUESS_CHARACTERS)


class MarksObservation(Observation):
    """What a player sees."""

    text: str = ""
    """The marks of the last guess, as text for the model."""
    num_guesses: int = 0
    is_solved: bool = False


class WordGameEnvironment(Environment):
    """One episode of `weightline.environments.word_game`."""

    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self) -> None:
        super().__init__()
        self._game: Game | None = None
        self._episode_id: str | None = None

    def reset(self, seed: int | None = None, episode_id: str | None = None, **_: Any) -> MarksObservation:
        """Begins the game of a seed, 0 if none is given."""
        self._game, self._episode_id = Game.of_seed(seed or 0), episode_id
        return MarksObservation()

    def step(self, action: GuessAction, timeout_s: float | None = None, **_: Any) -> MarksObservation:
        """Takes a guess. InputError before the first reset and after the end of a game."""
        game = self._game
        if game is None or game.is_over:
            raise InputError("no game is running: reset the environment first", field="environment")
        self._game = after = game.after(action.guess)
        return MarksObservation(
            text=answer_to(game, action.guess),
            num_guesses=after.num_guesses,
            is_solved=after.is_solved,
            reward=(after.best - game.best) / len(game.word),
            done=after.is_over,
        )

    @property
    def state(self) -> State:
        """The episode's name and its number of guesses. The word stays hidden."""
        return State(episode_id=self._episode_id, step_count=self._game.num_guesses if self._game else 0)


def build_app(max_sessions: int) -> Any:
    """Returns the ASGI app."""
    bounds = ConcurrencyConfig(max_concurrent_envs=max_sessions, session_timeout=IDLE_SECONDS)
    return create_fastapi_app(WordGameEnvironment, GuessAction, MarksObservation, concurrency_config=bounds)


def serve(listener: socket.socket, max_sessions: int) -> None:
    """Serves on a listening socket until a signal ends the process."""
    config = uvicorn.Config(
        build_app(max_sessions),
        ws_max_size=MAX_MESSAGE_NBYTES,
        limit_concurrency=max_sessions + _SPARE_CONNECTIONS,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=2,
    )
    uvicorn.Server(config).run(sockets=[listener])
