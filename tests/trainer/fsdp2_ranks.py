"""Rank program of test_fsdp2: a few optimizer steps under fully_shard, each a version. Run by torchrun."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from weightline.chain.read.history import open_chain
from weightline.trainer.session import PublishSession
from weightline.trainer.settings import PublishSettings


def main(chain_url: str, out: Path, computes_in: torch.dtype | None = None) -> None:
    """Train, publish, and let rank 0 save the gathered weights of the end."""
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    # 7 rows over 2 ranks: shards of unequal size; 1 row: a rank with nothing.
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 1))
    policy = MixedPrecisionPolicy(param_dtype=computes_in)
    for layer in model:
        fully_shard(layer, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    session = PublishSession(open_chain(chain_url), PublishSettings(coding="gap-by-magnitude"))
    session.start(model, None, 0)
    for step in range(1, 4):
        model(torch.randn(8, 5)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        session.sync(step)
    session.flush()
    session.close()
    full = {name: parameter.full_tensor().detach() for name, parameter in model.named_parameters()}
    if dist.get_rank() == 0:
        save_file(full, out)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
