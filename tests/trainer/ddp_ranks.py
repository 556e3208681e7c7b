"""Rank program of test_ddp: a few optimizer steps of plain data parallelism, each a version. Run by torchrun."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.nn.parallel import DistributedDataParallel

from weightline.chain.read.history import open_chain
from weightline.trainer.session import PublishSession
from weightline.trainer.settings import PublishSettings


def main(chain_url: str, coding: str, out: Path) -> None:
    """Train on data that differs by rank, publish, and let every rank save the weights that it ends with."""
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    # 35 and 7 elements over 2 ranks: slices of unequal size; 1 element: a rank with nothing.
    layers = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 1)).to(torch.bfloat16)
    model = DistributedDataParallel(layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    session = PublishSession(open_chain(chain_url), PublishSettings(coding=coding))
    session.start(layers, None, 0)
    torch.manual_seed(dist.get_rank())
    for step in range(1, 4):
        model(torch.randn(8, 5, dtype=torch.bfloat16)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        session.sync(step)
    session.flush()
    session.close()
    save_file(layers.state_dict(), out / f"end-{dist.get_rank()}.safetensors")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
