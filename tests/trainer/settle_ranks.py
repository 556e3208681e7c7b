"""Rank program of test_settle: what two ranks decide together about a version, and what both refuse."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel

from weightline.chain.read.history import open_chain
from weightline.errors import InputError
from weightline.trainer.session import PublishSession
from weightline.trainer.settings import PublishSettings


def _settle(folder: str, rank: int) -> list[int]:
    """The versions that hold the weights: unchanged, changed in the other rank's slice only, unchanged, a milestone."""
    layer = torch.nn.Linear(8, 8)
    found = []
    with PublishSession(open_chain(f"file://{folder}/settle"), PublishSettings()) as session:
        session.start(layer)
        for row in (None, 7, None):
            if row is not None:
                with torch.no_grad():
                    layer.weight[row] += 1
            mark = session.settle(1)
            assert mark is not None
            found.append(mark.version)
        mark = session.settle(1, is_milestone=True)
        assert mark is not None
        found.append(mark.version)
        # Only rank 0 logs, and it waits for the version: the other rank publishes on its own thread meanwhile.
        with torch.no_grad():
            layer.weight[0] += 1
        session.sync(2, awaits_log=True)
        if rank == 0:
            session.log(2, {"loss": 0.5})
            session.wait()
            assert open_chain(f"file://{folder}/settle").tip().metrics == {"loss": 0.5}
        dist.barrier()  # a collective of training's
        session.flush()
    return found


class _Outer(torch.nn.Module):
    """A model one part of which is wrapped."""

    def __init__(self) -> None:
        super().__init__()
        self.head = torch.nn.Linear(8, 8)
        self.body = _fsdp1(torch.nn.Linear(8, 8))


def _fsdp1(module: torch.nn.Module, *, use_orig_params: bool = True) -> Any:
    return FullyShardedDataParallel(module, use_orig_params=use_orig_params, device_id=torch.device("cpu"))


def _inside(use_orig_params: bool) -> torch.nn.Module:
    """The model that lies in a wrapper which its trainer holds."""
    inside = torch.nn.Sequential(torch.nn.Linear(8, 8))
    _KEPT.append(_fsdp1(inside, use_orig_params=use_orig_params))
    return inside


_KEPT: list[torch.nn.Module] = []
_REFUSED: dict[str, Callable[[], torch.nn.Module]] = {
    "whole": lambda: _fsdp1(torch.nn.Sequential(torch.nn.Linear(8, 8))),
    "flat": lambda: _fsdp1(torch.nn.Sequential(torch.nn.Linear(8, 8)), use_orig_params=False),
    "a part": _Outer,
    "inside": lambda: _inside(True),
    "inside, flat": lambda: _inside(False),
}


def _refusal(url: str, make: Callable[[], torch.nn.Module]) -> str:
    try:
        PublishSession(open_chain(url), PublishSettings()).start(make())
    except InputError as error:
        return str(error)
    return "not refused"


def main(folder: str) -> None:
    """Writes what this rank saw to rank-N.json in the folder."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    rank = dist.get_rank()
    seen: dict[str, Any] = {"settled": _settle(folder, rank)}
    seen |= {name: _refusal(f"file://{folder}/{name}", make) for name, make in _REFUSED.items()}
    Path(folder, f"rank-{rank}.json").write_text(json.dumps(seen))
    dist.barrier()
    dist.destroy_process_group()
