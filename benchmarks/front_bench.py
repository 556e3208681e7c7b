"""Measures the front: how much of each prompt its replica has answered before, with prefix affinity and round-robin.

    python -m benchmarks.front_bench [--replicas 3] [--conversations 24] [--turns 4] [--clients 6] [--rounds 2]

It starts embedded replicas as processes and a front before them in this process. Each round sends conversations whose
turns begin with all the text of the turns before, and groups of equal prompts as GRPO does, from several clients at a
time: once with prefix affinity, once with the same front and the replicas in turn, each with texts of its own. The
embedded server caches no prefixes; what a cache would find is counted by the text: the part of a prompt that agrees
with the beginning of one which the same replica has answered before.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import string
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from rich.console import Console
from rich.table import Table

from weightline.chain import open_chain
from weightline.chain.write.standalone import commit_folder
from weightline.front.affinity import Ranking, ranked
from weightline.front.app import build_app
from weightline.front.settings import FrontSettings
from weightline.serving.http.protocol import server_config
from weightline.serving.http.server import ServerSettings, listening
from weightline.stages.model import build_byte_tokenizer, materialize_model
from weightline.stages.recipe import ModelConfig, TinyModelConfig

_GROUP_SIZE = 4
_TURN_CHARACTERS = 60
_START_SECONDS = 300.0


class InTurn:
    """Ranks the replicas in turn, whatever the prompt."""

    def __init__(self) -> None:
        self._numbers = itertools.count()

    def __call__(self, _: str, names: Iterable[str]) -> list[str]:
        found, start = sorted(names), next(self._numbers)
        return [found[(start + number) % len(found)] for number in range(len(found))]


@dataclass
class Tally:
    """What one balance did, over all rounds."""

    seconds: float = 0.0
    num_characters: int = 0
    num_cached: int = 0
    num_cached_at_best: int = 0
    answered: dict[str, int] = field(default_factory=dict)
    _seen: dict[str, set[str]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def num_answered(self) -> int:
        return sum(self.answered.values())

    def count(self, prompt: str, replica: str) -> None:
        """Counts an answer, and what its replica and any replica had answered of the prompt's beginning."""
        beginnings = [prompt[:length] for length in range(1, len(prompt) + 1)]
        with self._lock:
            self.answered[replica] = self.answered.get(replica, 0) + 1
            self.num_characters += len(prompt)
            self.num_cached += sum(one in self._seen.setdefault(replica, set()) for one in beginnings)
            self.num_cached_at_best += sum(one in self._seen.setdefault("any", set()) for one in beginnings)
            self._seen[replica].update(beginnings)
            self._seen["any"].update(beginnings)


def main() -> None:
    """Prints one row for each balance."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, default=3)
    parser.add_argument("--conversations", type=int, default=24, help="conversations of a round; as many groups")
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    tallies = {"prefix affinity": Tally(), "round-robin": Tally()}
    rankings: dict[str, Ranking] = {"prefix affinity": ranked, "round-robin": InTurn()}
    with tempfile.TemporaryDirectory(prefix="weightline-bench-") as name, ExitStack() as running:
        folder = Path(name)
        chain_url = _make_chain(folder)
        for number in range(args.replicas):
            running.enter_context(_replica(chain_url, folder, f"replica-{number}"))
        urls = {
            name: running.enter_context(_front(chain_url, folder / f"front-{number}", rank, args.replicas))
            for number, (name, rank) in enumerate(rankings.items())
        }
        for seed in range(args.rounds):
            for name, url in urls.items():
                _play(url, tallies[name], seed, args.conversations, args.turns, args.clients)
    print(f"load {os.getloadavg()[0]:.1f}")
    _print(tallies)


def _play(url: str, tally: Tally, seed: int, num_conversations: int, num_turns: int, num_clients: int) -> None:
    """Plays conversations and groups from several clients at a time. Each client plays one after the other."""
    rng = random.Random(seed)
    began = time.perf_counter()
    with ThreadPoolExecutor(num_clients) as pool, httpx.Client(trust_env=False, timeout=300) as client:

        def send(route: str, body: dict[str, Any], prompt: str) -> dict[str, Any]:
            answer = client.post(f"{url}{route}", json=body | {"max_tokens": 8, "temperature": 0})
            answer.raise_for_status()
            tally.count(prompt, answer.headers["x-weightline-replica"])
            choice: dict[str, Any] = answer.json()["choices"][0]
            return choice

        def converse(turns: list[str]) -> None:
            messages: list[dict[str, str]] = []
            for turn in turns:
                messages.append({"role": "user", "content": turn})
                prompt = "".join(message["content"] for message in messages)
                messages.append(send("/v1/chat/completions", {"messages": messages}, prompt)["message"])

        def draw_group(prompt: str) -> None:
            for _ in range(_GROUP_SIZE):
                send("/v1/completions", {"prompt": prompt}, prompt)

        plays = [pool.submit(converse, [_text(rng) for _ in range(num_turns)]) for _ in range(num_conversations)]
        plays += [pool.submit(draw_group, _text(rng)) for _ in range(num_conversations)]
        for play in plays:
            play.result()
    tally.seconds += time.perf_counter() - began


def _text(rng: random.Random) -> str:
    return "".join(rng.choices(string.ascii_lowercase + " ", k=_TURN_CHARACTERS))


def _make_chain(folder: Path) -> str:
    """Commits a tiny model with a chat template as version 0. Returns the URL of its chain."""
    model = TinyModelConfig(max_position_embeddings=1024)
    checkpoint = materialize_model(ModelConfig(tiny=model), folder / "model", seed=0)
    tokenizer = build_byte_tokenizer(model.max_position_embeddings)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer.save_pretrained(checkpoint)
    url = (folder / "chain").as_uri()
    commit_folder(open_chain(url), checkpoint)
    return url


@contextmanager
def _replica(chain_url: str, folder: Path, name: str) -> Iterator[None]:
    argv = [sys.executable, "-m", "weightline", "serve", "transformers", "--follow", chain_url, "--name", name]
    argv += ["--state-dir", str(folder / name), "--port", "0"]
    with (folder / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(
            argv, stdout=log, stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
    try:
        yield
    finally:
        process.terminate()
        process.wait()


@contextmanager
def _front(chain_url: str, state_dir: Path, rank: Ranking, num_replicas: int) -> Iterator[str]:
    """Yields the URL of a front, once it knows all replicas."""
    state_dir.mkdir()
    with listening(ServerSettings(chain_url, state_dir, "front", port=0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        server = uvicorn.Server(server_config(build_app(FrontSettings(chain_url, state_dir), rank), graceful_seconds=5))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline and _num_up(url) < num_replicas:
            time.sleep(0.5)
        try:
            yield url
        finally:
            server.should_exit = True
            thread.join()


def _num_up(url: str) -> int:
    try:
        rows = httpx.get(f"{url}/weightline/front", trust_env=False).json()["replicas"]
    except httpx.TransportError:
        return 0
    return sum(row["is_up"] for row in rows)


def _print(tallies: dict[str, Tally]) -> None:
    table = Table("balance", "requests", "by replica", "of the prompts answered before", "at best", "requests / s")
    for name, tally in tallies.items():
        table.add_row(
            name,
            str(tally.num_answered),
            " ".join(str(count) for count in sorted(tally.answered.values(), reverse=True)),
            f"{tally.num_cached / tally.num_characters:.1%}",
            f"{tally.num_cached_at_best / tally.num_characters:.1%}",
            f"{tally.num_answered / tally.seconds:.1f}",
        )
    Console(width=120, highlight=False).print(table)


if __name__ == "__main__":
    main()
