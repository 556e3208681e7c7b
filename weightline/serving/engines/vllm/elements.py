"""Scattered elements of a flat tensor, read and written where it lives.

Legend: N elements of memory, K scattered ones.
"""

from __future__ import annotations

import os

import torch


def _own_cpus() -> frozenset[int]:
    """The CPUs of the process that started this one, too: vLLM pins its workers to fewer before it imports this."""
    if not hasattr(os, "sched_getaffinity"):
        return frozenset()
    return frozenset(os.sched_getaffinity(0) | os.sched_getaffinity(os.getppid()))


_CPUS = _own_cpus()


def num_cpus() -> int:
    """How many threads can run at once here. In a pause that is more than the engine computes with: it stands still."""
    return max(1, len(_CPUS))


def use_all_cpus() -> None:
    """Let the calling thread run wherever the process could when it started. Cheap; safe to repeat."""
    if _CPUS:
        os.sched_setaffinity(0, _CPUS)


def write_elements(flat_N: torch.Tensor, at_K: torch.Tensor, bits_K: torch.Tensor) -> bool:
    """flat_N[at_K] = bits_K, all on one device, read back: whether all of it is there.

    `at_K` lies within, which was checked when it was made, and names no element twice.
    """
    if flat_N.device.type != "cpu":
        flat_N.index_copy_(0, at_K, bits_K)
        return torch.equal(flat_N.index_select(0, at_K), bits_K)
    from weightline.serving.engines.vllm import kernels

    return int(kernels.write_elements(flat_N.numpy(), at_K.numpy(), bits_K.numpy())) == 0


def hold_elements(flat_N: torch.Tensor, at_K: torch.Tensor, bits_K: torch.Tensor) -> bool:
    """Whether flat_N[at_K] equals bits_K, bit for bit."""
    if flat_N.device.type != "cpu":
        return torch.equal(flat_N.index_select(0, at_K), bits_K)
    from weightline.serving.engines.vllm import kernels

    return int(kernels.count_differing(flat_N.numpy(), at_K.numpy(), bits_K.numpy())) == 0
