"""One episode in an OpenEnv server: against OpenEnv's own client, killed servers, full ones and wrong ones."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager

import pytest
from websockets.asyncio.server import ServerConnection, serve

from tests.environments.servers import RunningEnvironment, running_environment
from tests.waiting import PATIENCE_SECONDS
from weightline.environments.remote import RemoteEnvironment, Step, error_of, parse_step, websocket_address
from weightline.environments.word_game import MAX_GUESSES, Game
from weightline.errors import InputError, RolloutError

SEEDS = (1, 2, 3)


def _patient(url: str) -> RemoteEnvironment:
    return RemoteEnvironment(url, deadline_seconds=PATIENCE_SECONDS, message_seconds=PATIENCE_SECONDS)


def _guesses(seed: int) -> list[str]:
    """Five guesses, of which the last is the word."""
    return ["abc", "", "b\u00e9d", "ddd", Game.of_seed(seed).word]


async def _play(environment: RemoteEnvironment, seed: int) -> list[Step]:
    steps = [await environment.reset(seed)]
    for guess in _guesses(seed):
        if not steps[-1].is_done:
            steps.append(await environment.step({"guess": guess}))
    return steps


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningEnvironment]:
    with running_environment(tmp_path_factory.mktemp("environment") / "log", "--max-sessions", "2") as running:
        yield running
        running.process.terminate()
        assert running.process.wait(PATIENCE_SECONDS) == 0


@pytest.mark.process
def test_it_sees_what_openenv_s_own_client_sees(environment: RunningEnvironment) -> None:
    from openenv.core import GenericEnvClient

    async def seen_by_openenv(seed: int) -> list[Step]:
        async with GenericEnvClient(environment.url, connect_timeout_s=PATIENCE_SECONDS) as client:
            found = [await client.reset(seed=seed)]
            for guess in _guesses(seed):
                if not found[-1].done:
                    found.append(await client.step({"guess": guess}))
        return [Step(one.observation, one.reward, one.done) for one in found]

    async def seen_by_us(seed: int) -> list[Step]:
        async with _patient(environment.url) as remote:
            return await _play(remote, seed)

    for seed in SEEDS:
        steps = asyncio.run(seen_by_us(seed))
        assert steps == asyncio.run(seen_by_openenv(seed))
        assert steps[-1].is_done
        assert steps[-1].observation["is_solved"]
        assert sum(step.reward or 0.0 for step in steps) == pytest.approx(1.0)


@pytest.mark.process
def test_an_episode_goes_on_when_the_server_was_killed_and_restarted(environment: RunningEnvironment) -> None:
    async def disturbed(seed: int) -> tuple[list[Step], int]:
        async with _patient(environment.url) as remote:
            steps = [await remote.reset(seed)]
            for number, guess in enumerate(_guesses(seed)):
                if number == 2:
                    await asyncio.to_thread(environment.kill)
                    await asyncio.to_thread(environment.restart)
                if not steps[-1].is_done:
                    steps.append(await remote.step({"guess": guess}))
            return steps, remote.num_reconnects

    async def undisturbed(seed: int) -> list[Step]:
        async with _patient(environment.url) as remote:
            return await _play(remote, seed)

    seed = next(seed for seed in range(100) if Game.of_seed(seed).word not in _guesses(seed)[:4])
    steps, num_reconnects = asyncio.run(disturbed(seed))
    assert num_reconnects == 1
    assert len(steps) == 1 + MAX_GUESSES
    assert steps == asyncio.run(undisturbed(seed))


@pytest.mark.process
def test_an_episode_waits_for_a_full_server(environment: RunningEnvironment) -> None:
    """Five episodes at once, of which the server takes two."""

    async def all_at_once() -> list[list[Step]]:
        async def one(seed: int) -> list[Step]:
            async with _patient(environment.url) as remote:
                return await _play(remote, seed)

        return await asyncio.gather(*(one(seed) for seed in range(5)))

    for seed, steps in enumerate(asyncio.run(all_at_once())):
        assert steps[-1].observation["is_solved"], seed


@pytest.mark.process
@pytest.mark.parametrize(
    ("action", "code"),
    [({"guess": "a" * 65}, "VALIDATION_ERROR"), ({"word": "abc"}, "VALIDATION_ERROR"), ({}, "VALIDATION_ERROR")],
)
def test_a_wrong_action_is_not_tried_again(environment: RunningEnvironment, action: dict[str, str], code: str) -> None:
    async def act() -> None:
        async with _patient(environment.url) as remote:
            await remote.reset(1)
            await remote.step(action)

    with pytest.raises(RolloutError, match=code):
        asyncio.run(act())


@pytest.mark.process
def test_an_action_after_the_end_is_refused(environment: RunningEnvironment) -> None:
    async def act() -> None:
        async with _patient(environment.url) as remote:
            await remote.reset(1)
            for _ in range(2):
                await remote.step({"guess": Game.of_seed(1).word})

    with pytest.raises(RolloutError, match="reset the environment"):
        asyncio.run(act())


Answer = Callable[[ServerConnection, str], str | bytes | None]


@asynccontextmanager
async def _server(answer: Answer) -> AsyncIterator[str]:
    """A server that answers each message with what `answer` returns, and hangs up where that is None."""

    async def handle(connection: ServerConnection) -> None:
        async for message in connection:
            reply = answer(connection, str(message))
            if reply is None:
                return
            await connection.send(reply)

    async with serve(handle, "127.0.0.1", 0) as server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


def _observation(text: str) -> str:
    return json.dumps({"type": "observation", "data": {"observation": {"text": text}, "reward": None, "done": False}})


def test_an_environment_that_answers_differently_when_repeated_fails_the_episode() -> None:
    messages: list[str] = []

    def answer(_: ServerConnection, message: str) -> str | None:
        messages.append(message)
        return None if len(messages) == 3 else _observation(str(len(messages)))

    async def act() -> None:
        async with _server(answer) as url, _patient(url) as remote:
            await remote.reset(1)
            await remote.step({"guess": "abc"})
            await remote.step({"guess": "abd"})

    with pytest.raises(RolloutError, match="answered differently"):
        asyncio.run(act())
    assert messages[3] == messages[0]


@pytest.mark.parametrize("reply", ["[]", "{}", "no JSON", b"bytes", '{"type": "observation", "data": {"reward": 1}}'])
def test_what_is_no_observation_is_named(reply: str | bytes) -> None:
    async def act() -> None:
        async with _server(lambda *_: reply) as url, _patient(url) as remote:
            await remote.reset(1)

    with pytest.raises(RolloutError, match=r"http://127\.0\.0\.1"):
        asyncio.run(act())


def test_a_server_that_stays_away_is_named_within_the_deadline() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"

        async def act() -> None:
            async with RemoteEnvironment(url, deadline_seconds=0.3) as remote:
                await remote.reset(1)

        with pytest.raises(RolloutError, match=r"did not answer within 0\.3 s") as caught:
            asyncio.run(act())
    assert url in str(caught.value)


def test_a_server_that_always_hangs_up_is_given_up() -> None:
    async def act() -> None:
        async with _server(lambda *_: None) as url, RemoteEnvironment(url, deadline_seconds=0.3) as remote:
            await remote.reset(1)

    with pytest.raises(RolloutError, match="did not answer within"):
        asyncio.run(act())


def test_the_headers_of_a_connection() -> None:
    seen: list[str | None] = []

    def answer(connection: ServerConnection, _: str) -> str:
        assert connection.request is not None
        seen.append(connection.request.headers.get("Authorization"))
        return _observation("")

    async def act() -> None:
        async with _server(answer) as url, RemoteEnvironment(url, headers={"Authorization": "Bearer x"}) as remote:
            await remote.reset(1)

    asyncio.run(act())
    assert seen == ["Bearer x"]


def test_an_episode_begins_with_a_reset() -> None:
    with pytest.raises(InputError, match="begins with a reset"):
        asyncio.run(RemoteEnvironment("http://127.0.0.1:1").step({}))


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("http://127.0.0.1:8010", "ws://127.0.0.1:8010/ws"),
        ("https://user-game.hf.space/", "wss://user-game.hf.space/ws"),
        ("ws://host/prefix", "ws://host/prefix/ws"),
    ],
)
def test_the_address_of_a_url(url: str, address: str) -> None:
    assert websocket_address(url) == address


@pytest.mark.parametrize("url", ["", "127.0.0.1:8010", "ftp://host", "http://"])
def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(InputError, match="no URL of an environment"):
        websocket_address(url)


def test_replies_are_parsed() -> None:
    assert parse_step(_observation("x"), "url") == Step({"text": "x"}, None, False)
    reply = '{"type": "observation", "data": {"observation": {}, "reward": 1, "done": true}}'
    assert parse_step(reply, "url") == Step({}, 1.0, True)
    assert error_of('{"type": "error", "data": {"message": "full", "code": "CAPACITY_REACHED"}}') == (
        "CAPACITY_REACHED",
        "full",
    )
    assert error_of(reply) == (None, "")
