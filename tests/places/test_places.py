"""A trainer, a replica and an environment in three places, which share nothing but HTTP to one bucket of the Hub.

The places are network namespaces. The trainer reaches the replica and the environment, both the trainer and the replica
reach the Hub, and there is no other way between them: no other address, no file, no shared memory. The Hub is the
emulator, behind its real client; what is written is visible 2.5 s later, which is what was measured of the real one.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.places.network import NoNamespacesError, Place, places
from tests.waiting import wait_until
from weightline.environments.word_game import URL_VARIABLE, prompts, transcripts
from weightline.launch.command import launch_argv, launch_environment
from weightline.rollouts.record import parse_samples
from weightline.stages.job import StageJob, StageResult
from weightline.stages.model import build_byte_tokenizer, build_tiny_model
from weightline.stages.recipe import DatasetConfig, RolloutsConfig, StageConfig, TinyModelConfig

pytestmark = [pytest.mark.process, pytest.mark.train, pytest.mark.nightly]

NUM_STEPS = 20
#: The environment is killed, and started again, after this step.
KILLED_AFTER = 5
STALENESS = 2
NUM_GENERATIONS = 4
LAG_SECONDS = 2.5
TOKEN = "token-of-the-places"
CHAIN = "hf://buckets/user/places/chains/word-game"
HUB_PORT, REPLICA_PORT, ENVIRONMENT_PORT = 8080, 8000, 8010
LINKS = [("trainer", "hub"), ("replica", "hub"), ("trainer", "replica"), ("trainer", "environment")]
TINY = TinyModelConfig(
    hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
    head_dim=32, initializer_range=0.1,
)  # fmt: skip
_END, _PAD, _IGNORED = 256, 257, -100


def make_model(folder: Path) -> Path:
    """A model that has seen some games: it mostly writes letters of the game."""
    torch.manual_seed(0)
    model = build_tiny_model(TINY, 0).to(torch.float32)
    rows = [(list(row["prompt"].encode()), [*row["completion"].encode(), _END]) for row in transcripts(2048)]
    width = max(len(prompt) + len(completion) for prompt, completion in rows)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    for start in range(0, len(rows), 32):
        batch = rows[start : start + 32]
        padding = [[_PAD] * (width - len(prompt) - len(completion)) for prompt, completion in batch]
        tokens = torch.tensor([[*p, *c, *pad] for (p, c), pad in zip(batch, padding, strict=True)])
        labels = torch.tensor(
            [[_IGNORED] * len(p) + c + [_IGNORED] * len(pad) for (p, c), pad in zip(batch, padding, strict=True)]
        )
        model(input_ids=tokens, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    build_byte_tokenizer(TINY.max_position_embeddings).save_pretrained(folder)
    return folder


@pytest.fixture
def found(tmp_path: Path) -> Iterator[dict[str, Place]]:
    with ExitStack() as held:
        try:
            made = held.enter_context(places(tmp_path / "p", ("hub", "trainer", "replica", "environment"), LINKS))
        except NoNamespacesError as error:
            pytest.skip(f"this machine makes no network namespaces: {error}")
        yield made


@contextmanager
def _running(place: Place, name: str, argv: list[str], env: dict[str, str] | None = None) -> Iterator[Any]:
    """A process of a place for the length of a block, with all that it starts."""
    process = place.start([sys.executable, "-m", *argv], place.folder / f"{name}.log", env)
    try:
        yield process
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _log_of(place: Place) -> str:
    return "\n".join(path.read_text(errors="replace")[-3000:] for path in sorted(place.folder.glob("*.log")))


def _reaches(place: Place, address: str, port: int) -> bool:
    program = (
        "import socket, sys\n"
        "try: socket.create_connection((sys.argv[1], int(sys.argv[2])), 2).close(); print('yes')\n"
        "except OSError as error: print(error)"
    )
    return place.ask([sys.executable, "-c", program, address, str(port)]).strip() == "yes"


def _hub_environment(hub: Place) -> dict[str, str]:
    return {
        "HF_ENDPOINT": f"http://{hub.address}:{HUB_PORT}", "HF_TOKEN": "hf_of_the_places",
        "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_XET_TELEMETRY_ENABLED": "0",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1", "WEIGHTLINE_TOKEN": TOKEN, "OMP_NUM_THREADS": "1",
    }  # fmt: skip


def _job(trainer: Place) -> StageJob:
    data = trainer.folder / "word-game.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in prompts(400)))
    stage = StageConfig(
        kind="grpo", max_steps=NUM_STEPS, learning_rate=1e-4, per_device_batch_size=8, sync_steps=1, save_steps=10,
        dataset=DatasetConfig(path=str(data)), reward="weightline.environments.word_game:reward",
        rollouts=RolloutsConfig(
            lookahead=1, staleness=STALENESS, deadline_seconds=600, rollout="weightline.environments.word_game:play"
        ),
        trainer_args={
            "num_generations": NUM_GENERATIONS, "max_completion_length": 32, "lr_scheduler_type": "constant",
            "gradient_checkpointing": False,
        },
    )  # fmt: skip
    return StageJob(
        stage=stage, model_dir=make_model(trainer.folder / "start"), dtype="float32",
        output_dir=trainer.folder / "grpo", run_id="places", chain_url=CHAIN,
    )  # fmt: skip


def _steps(job: StageJob) -> list[dict[str, float]]:
    if not job.metrics_path.exists():
        return []
    lines = [json.loads(line) for line in job.metrics_path.read_text().splitlines()]
    return [line for line in lines if "reward" in line]


def test_twenty_steps_in_three_places(found: dict[str, Place]) -> None:
    hub, trainer, replica, environment = (found[name] for name in ("hub", "trainer", "replica", "environment"))
    begun = time.monotonic()
    job = _job(trainer)
    job_path = trainer.folder / "job.json"
    job.save(job_path)
    lags = ["--list-lag-seconds", str(LAG_SECONDS), "--info-lag-seconds", str(LAG_SECONDS)]
    serve_hub = ["tests.hub_emulator", "--host", hub.address, "--port", str(HUB_PORT), *lags]
    game_url = f"http://{environment.address}:{ENVIRONMENT_PORT}"
    serve_game = ["weightline", "serve", "environment", "word-game", "--host", environment.address]
    serve_chain = [
        "weightline", "serve", "transformers", "--follow", CHAIN, "--name", "elsewhere", "--state-dir", "state",
        "--host", replica.address, "--port", str(REPLICA_PORT), "--every", "1",
    ]  # fmt: skip
    trainer_environment = _hub_environment(hub) | {
        URL_VARIABLE: game_url, "WEIGHTLINE_REPLICA_HOSTS": replica.address, "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONWARNINGS": "ignore::FutureWarning",
    }  # fmt: skip

    def told() -> str:
        return "\n".join(f"--- {place.name}\n{_log_of(place)}" for place in found.values())

    with ExitStack() as held:
        held.enter_context(_running(hub, "hub", serve_hub))
        game = held.enter_context(_running(environment, "game", serve_game))
        held.enter_context(_running(replica, "replica", serve_chain, _hub_environment(hub)))
        # The launcher's interpreter is the first word of its command, `-m` the second.
        argv = launch_argv(job_path, 2)[2:]
        ranks = held.enter_context(_running(trainer, "ranks", argv, launch_environment(job, trainer_environment)))

        for step in range(1, NUM_STEPS + 1):
            wait_until(lambda step=step: len(_steps(job)) >= step or ranks.poll() is not None, told=told)
            if step == KILLED_AFTER:
                _end(game)
                game = held.enter_context(_running(environment, "game", serve_game))
        wait_until(lambda: ranks.poll() is not None, told=told)
        assert ranks.returncode == 0, told()
        trained_seconds = time.monotonic() - begun

        # The places are what they are said to be.
        assert _reaches(trainer, environment.address, ENVIRONMENT_PORT)
        assert not _reaches(environment, hub.address, HUB_PORT)
        assert not _reaches(replica, environment.address, ENVIRONMENT_PORT)
        assert not _reaches(environment, replica.address, REPLICA_PORT)
        assert not _reaches(hub, environment.address, ENVIRONMENT_PORT)
        for place in found.values():
            listed = place.ask(["ls", *(str(folder) for folder in place.hidden)]).split()
            assert [name for name in listed if not name.endswith(":")] == []

        # Not every version is served: the replica moves to the newest one.
        url = f"http://{replica.address}:{REPLICA_PORT}/weightline/version?min={NUM_STEPS}&wait=120"
        read = "import sys, urllib.request as u; print(u.urlopen(sys.argv[1]).read().decode())"
        tip = json.loads(trainer.ask([sys.executable, "-c", read, url]))
        argv = [sys.executable, "-m", "tests.places.report", CHAIN, str(job.final_model_dir)]
        seen = json.loads(trainer.ask(argv, trainer_environment))

    result = StageResult.load(job)
    assert result is not None
    assert result.global_step == NUM_STEPS
    # Each version is whole, replays to its digests, and the last one is what the trainer saved, bit for bit.
    assert seen["findings"] == []
    assert seen["differing"] == []
    assert seen["num_versions"] == NUM_STEPS + 1
    assert seen["global_steps"] == list(range(NUM_STEPS + 1))
    assert min(seen["num_changed"]) > 0
    # The replica serves the last of them, and has served enough others.
    assert tip["version"] == NUM_STEPS
    assert seen["served"][-1] == NUM_STEPS
    # Each step was trained on games that the replica played with weights no older than the bound.
    records = [parse_samples(record) for record in seen["samples"]]
    assert [record.global_step for record in records] == list(range(1, NUM_STEPS + 1))
    for record in records:
        assert record.staleness.max is not None
        assert record.staleness.max <= STALENESS
        assert set(record.replicas) == {"elsewhere"}
        assert sum(record.made_by.values()) == 2 * 8
        assert set(record.made_by) <= set(seen["served"])
        for group in record.groups:
            assert group.prompt.startswith("game ")
            assert len(group.completions) == NUM_GENERATIONS
    assert len({version for record in records for version in record.made_by}) > NUM_STEPS // (STALENESS + 1)
    steps = _steps(job)
    assert [line["step"] for line in steps] == list(range(1, NUM_STEPS + 1))
    print(
        f"{NUM_STEPS} steps in three places: {trained_seconds:.0f} s with all starts; reward of the first five steps "
        f"{sum(line['reward'] for line in steps[:5]) / 5:.3f}, of the last five "
        f"{sum(line['reward'] for line in steps[-5:]) / 5:.3f}; versions served {seen['served']}"
    )
