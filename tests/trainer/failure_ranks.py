"""Rank program of test_failures: in each scenario something breaks on one of two ranks, and both say what they saw."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pydantic import BaseModel

from tests.waiting import wait_until
from weightline.chain.read.history import open_chain
from weightline.trainer.session import PublishSession
from weightline.trainer.settings import PublishSettings


class _Number(BaseModel):
    value: int


def _raiser(error: BaseException) -> Callable[..., Any]:
    def fail(*_: object, **__: object) -> Any:
        raise error

    return fail


def _refuse_as_pydantic(*_: object, **__: object) -> Any:
    _Number.model_validate({"value": "none"})


#: Scenario -> (rank that breaks, what is replaced there, by what). None: the training loop itself.
BROKEN: dict[str, tuple[int, str | None, Callable[..., Any]]] = {
    "capture": (1, "weightline.trainer.baseline.capture_tensor", _raiser(MemoryError("no room"))),
    "encode": (1, "weightline.trainer.writer.write_delta", _raiser(ValueError("no such table"))),
    "upload": (1, "weightline.store.local.LocalStore.put_file", _raiser(KeyError("payload"))),
    "commit": (0, "weightline.trainer.writer.commit_version", _refuse_as_pydantic),
    "thread": (1, "weightline.trainer.writer.VersionWriter._step", _raiser(SystemExit(3))),
    "none": (2, None, _raiser(RuntimeError())),
    "loop": (1, None, _raiser(RuntimeError("the user's callback broke"))),
}


def _train(chain_url: str, scenario: str, rank: int) -> None:
    breaks, name, replacement = BROKEN[scenario]
    layer = torch.nn.Linear(64, 64)
    with (
        pytest.MonkeyPatch.context() as patch,
        PublishSession(open_chain(chain_url), PublishSettings(close_seconds=60)) as session,
    ):
        session.start(layer)
        if rank == breaks and name is not None:
            patch.setattr(name, replacement)
        for step in range(1, 4):
            with torch.no_grad():
                layer.weight += 1
            if rank == breaks and name is None:
                replacement()
            session.sync(step)
        session.flush()


def _break_at_start(chain_url: str, scenario: str, rank: int) -> None:
    layer = torch.nn.Linear(64, 64)
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr("weightline.trainer.session.Baseline", _raiser(MemoryError("no room")))
        PublishSession(open_chain(chain_url), PublishSettings()).start(layer)


def _no_publisher_left() -> bool:
    return not any(thread.name == "weightline-publisher" for thread in threading.enumerate())


def _error_of(work: Callable[[], None]) -> str:
    try:
        work()
    except BaseException as error:  # noqa: BLE001 - what this program is to report
        return f"{type(error).__name__}: {error}"
    return "no error"


def main(folder: str) -> None:
    """Runs every scenario. Writes, by scenario, the error that this rank got, to rank-N.json in the folder."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    seen: dict[str, str] = {}
    for scenario in (*BROKEN, "start"):
        torch.manual_seed(0)
        url = f"file://{folder}/bucket/{scenario}"
        train = _break_at_start if scenario == "start" else _train
        seen[scenario] = _error_of(lambda train=train, url=url, scenario=scenario: train(url, scenario, rank))
        wait_until(_no_publisher_left)
        dist.barrier()
    Path(folder, f"rank-{rank}.json").write_text(json.dumps(seen))
    dist.destroy_process_group()
