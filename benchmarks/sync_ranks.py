"""Two trainer ranks as processes, each with half of a model under FSDP 2, that publish a version when they are asked.

What they run to publish is what the callback runs: `PublishSession`, and on rank 0 the `Pusher`. Only the optimizer is
simulated, see `take_step`. Times are those of the monotonic clock, which all processes of a machine share.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numba import njit
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, Qwen3Config

from benchmarks.sync_places import end_with_parent
from weightline.chain import open_chain
from weightline.chain.upkeep.compact import AnchorPolicy
from weightline.rollouts.push import Pusher
from weightline.stages.model import build_byte_tokenizer
from weightline.trainer.session import PublishSession
from weightline.trainer.settings import PublishSettings
from weightline.trainer.steps import Step

NUM_RANKS = 2
_MAX_LENGTH = 1024
#: Elements that `take_step` moves at a time: what they take stays in a core's cache.
_PIECE = 1 << 18
#: No anchor is written after the first version: it would be written beside a version, and hold up the next one.
_NO_ANCHORS = AnchorPolicy(download_nbytes_per_second=1e15, delta_elements_per_second=1e15)


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a Qwen3 with tied embeddings."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int

    def config(self) -> Any:
        return Qwen3Config(
            vocab_size=self.vocab_size, hidden_size=self.hidden_size, intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_layers, num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_kv_heads, head_dim=self.head_dim, max_position_embeddings=_MAX_LENGTH,
            tie_word_embeddings=True, bos_token_id=None, eos_token_id=256, pad_token_id=257, initializer_range=0.02,
        )  # fmt: skip


SHAPES = {
    "Qwen3-0.6B": Shape(1024, 3072, 28, 16, 8, 128, 151_936),
    "small": Shape(256, 768, 4, 4, 2, 64, 4096),
}


@dataclass(frozen=True, slots=True)
class RankTimes:
    """When one rank was done with its parts of a sync."""

    stepped: float
    captured: float
    """When the session gave the trainer's thread back."""
    encoded: float
    uploaded: float
    committed: float
    """When the version existed. Only valid on rank 0."""


class TrainerRanks:
    """The ranks, seen from the process that started them. All of them do the same, at the same time."""

    def __init__(self, connections: list[Connection]) -> None:
        self._connections = connections
        self.num_elements: int = self._answers()[0]

    def open(self, chain_url: str, is_pushed: bool) -> int:
        """Commits the weights as the first version of a chain, and returns its number. Later ones are pushed or not."""
        version: int = self._ask("open", chain_url, is_pushed)[0]
        return version

    def sync(self, step_size: float) -> list[RankTimes]:
        """Takes an optimizer step, publishes the next version, and returns the times of each rank."""
        return self._ask("sync", step_size)

    def close(self) -> None:
        """Ends the publishing to the chain."""
        self._ask("close")

    def _ask(self, name: str, *arguments: object) -> list[Any]:
        for one in self._connections:
            one.send((name, arguments))
        return self._answers()

    def _answers(self) -> list[Any]:
        try:
            return [one.recv() for one in self._connections]
        except EOFError:
            raise SystemExit("a rank has ended: its error is above") from None


@contextmanager
def trainer_ranks(shape: Shape, folder: Path) -> Iterator[TrainerRanks]:
    """Yields running ranks that hold a model of that shape with random weights.

    They are forked, so that torch is imported once. No thread may run here yet.
    """
    context = multiprocessing.get_context("fork")
    connections, processes = [], []
    for rank in range(NUM_RANKS):
        here, there = context.Pipe()
        process = context.Process(target=_run_rank, args=(rank, shape, folder / "rendezvous", there), daemon=True)
        process.start()
        there.close()
        connections.append(here)
        processes.append(process)
    try:
        yield TrainerRanks(connections)
    finally:
        for connection, process in zip(connections, processes, strict=True):
            with suppress(OSError):  # it has ended with an error
                connection.send(None)
            process.join(60)


def _run_rank(rank: int, shape: Shape, rendezvous: Path, asked: Connection) -> None:
    end_with_parent()
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=rendezvous.as_uri(), rank=rank, world_size=NUM_RANKS)
    trainer = _Trainer(rank, shape)
    asked.send(sum(parameter.numel() for parameter in trainer.model.parameters()))
    while (request := asked.recv()) is not None:
        name, arguments = request
        asked.send(getattr(trainer, name)(*arguments))
    dist.destroy_process_group()


class _Trainer:
    """One rank."""

    def __init__(self, rank: int, shape: Shape) -> None:
        torch.manual_seed(0)
        self.model = AutoModelForCausalLM.from_config(shape.config(), dtype=torch.bfloat16)
        mesh = init_device_mesh("cpu", (NUM_RANKS,))
        for layer in self.model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(self.model, mesh=mesh)
        self._rank = rank
        self._random_state = np.uint64(1 + rank)
        self._step = 0

    def open(self, chain_url: str, is_pushed: bool) -> int:
        self._marks, self._pusher = _Marks(), None
        settings = PublishSettings(stage="sync-bench", anchor_policy=_NO_ANCHORS)
        self._session = PublishSession(open_chain(chain_url), settings, self._marks)
        self._session.on_committed(self._marks.note_commit)
        if self._rank == 0 and is_pushed:
            self._pusher = Pusher(chain_url)
            self._session.on_committed(self._pusher.committed)
        self._session.start(self.model, build_byte_tokenizer(_MAX_LENGTH))
        return self._session.present_version

    def sync(self, step_size: float) -> RankTimes:
        self._random_state = take_step(self.model, step_size, self._random_state)
        dist.barrier()
        stepped = time.monotonic()
        self._step += 1
        self._session.sync(self._step)
        captured = time.monotonic()
        self._session.flush()
        version = self._session.present_version
        ended = self._marks.of(version)
        return RankTimes(
            stepped, captured, ended["compute_delta"], ended["upload_payload"], ended.get("committed", 0.0)
        )

    def close(self) -> None:
        self._session.close()
        if self._pusher is not None:
            self._pusher.close()


class _Marks:
    """Notes when each step of a version ended: a `StepObserver`."""

    def __init__(self) -> None:
        self._ended: dict[int, dict[str, float]] = {}
        self._waiting: list[threading.Thread] = []

    def observe(self, step: Step) -> None:
        thread = threading.Thread(target=self._wait, args=(step,), daemon=True)
        self._waiting.append(thread)
        thread.start()

    def close(self) -> None:
        return

    def note_commit(self, version: int, _: str) -> None:
        self._ended.setdefault(version, {})["committed"] = time.monotonic()

    def of(self, version: int) -> dict[str, float]:
        while self._waiting:
            self._waiting.pop().join()
        return self._ended[version]

    def _wait(self, step: Step) -> None:
        step.wait()
        self._ended.setdefault(step.version, {})[step.name] = time.monotonic()


@torch.no_grad()
def take_step(model: torch.nn.Module, step_size: float, random_state: np.uint64) -> np.uint64:
    """Changes this rank's bf16 weights as a step of an optimizer does that holds them in float32.

    The float32 weight lies anywhere in the range that rounds to the bf16 weight, and moves up or down by the step. So a
    weight changes in proportion to the step and to the density of bf16 around it, mostly by one unit in the last place.
    Returns the next random state.
    """
    for parameter in model.parameters():
        for piece in parameter.to_local().view(-1).split(_PIECE):
            wide = piece.float()
            bits_N = piece.view(torch.int16).numpy()
            random_state = _move(wide.numpy(), bits_N, _UNITS_E, np.float32(step_size), np.uint64(random_state))
            piece.copy_(wide)
    return random_state


#: The unit in the last place of bf16, by the bits of the exponent.
_UNITS_E = np.ldexp(1.0, np.arange(256) - 127 - 7).astype(np.float32)


@njit
def _move(wide_N: Any, bits_N: Any, units_E: Any, step_size: Any, state: Any) -> Any:
    """Replaces the weights by float32 weights that round to them, moved by the step. Returns the next random state."""
    for at in range(wide_N.size):
        state ^= state << np.uint64(13)
        state ^= state >> np.uint64(7)
        state ^= state << np.uint64(17)
        place = np.float32(np.int32(state >> np.uint64(32))) * np.float32(2.0**-32)
        sign = np.float32(np.int64(state & np.uint64(2)) - 1)
        unit = units_E[(bits_N[at] >> 7) & 0xFF]
        # Below a power of two, bf16 is twice as dense as above it.
        below = min(place, np.float32(0)) * np.float32(0.5 if bits_N[at] & 0x7F == 0 else 1)
        offset = (below + max(place, np.float32(0))) * unit
        wide_N[at] += np.copysign(np.float32(1), wide_N[at]) * offset + sign * step_size
    return state
