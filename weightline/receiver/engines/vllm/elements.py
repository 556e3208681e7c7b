"""Scattered elements of a flat tensor, read and written where it lives.

Legend: N elements of memory, K scattered ones.
"""

from __future__ import annotations

import os

import torch

#: The CPUs that this process was given. vLLM pins threads to one each, and what they start inherits that.
_CPUS = frozenset(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else frozenset[int]()


def use_all_cpus() -> None:
    """Let the calling thread run wherever the process could when it started. Cheap; safe to repeat."""
    if _CPUS:
        os.sched_setaffinity(0, _CPUS)


def write_elements(flat_N: torch.Tensor, at_K: torch.Tensor, bits_K: torch.Tensor) -> None:
    """flat_N[at_K] = bits_K, all on one device; `at_K` lies within, which was checked when it was made."""
    if flat_N.device.type != "cpu":
        flat_N.index_copy_(0, at_K, bits_K)
        return
    from weightline.receiver.engines.vllm import kernels

    kernels.write_elements(flat_N.numpy(), at_K.numpy(), bits_K.numpy())


def hold_elements(flat_N: torch.Tensor, at_K: torch.Tensor, bits_K: torch.Tensor) -> bool:
    """Whether flat_N[at_K] equals bits_K, bit for bit."""
    if flat_N.device.type != "cpu":
        return torch.equal(flat_N.index_select(0, at_K), bits_K)
    from weightline.receiver.engines.vllm import kernels

    return int(kernels.count_differing(flat_N.numpy(), at_K.numpy(), bits_K.numpy())) == 0
