"""Prepares training on a CPU: one core per rank, and no compiler."""

from __future__ import annotations

import os

from torch import set_num_threads


def use_one_core_without_compiler() -> None:
    """Configures this process for training on the CPU: one thread per rank, and gloo without DeepSpeed's extension.

    DeepSpeed would compile a shared-memory all-reduce when the process group starts, and fails without a C++ compiler.
    For every gradient that it reduces it determines the number of ranks of this machine, for which it starts `numactl`
    each time unless LOCAL_SIZE is set, which only its own launchers do.
    """
    import deepspeed.ops

    set_num_threads(1)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    os.environ.setdefault("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1"))
