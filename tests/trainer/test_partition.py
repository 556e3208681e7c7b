"""How tensors are dealt out to ranks."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from weightline.trainer.partition import even_slice, partition_of


@given(st.integers(0, 10_000), st.integers(1, 64))
def test_slices_cover_every_element_once(num_elements: int, world_size: int) -> None:
    slices = [even_slice(num_elements, rank, world_size) for rank in range(world_size)]
    covered = [index for start, length in slices for index in range(start, start + length)]
    assert covered == list(range(num_elements))


def test_ranks_of_a_replicated_model_share_it() -> None:
    model = torch.nn.Linear(5, 3)
    shards = [shard for rank in range(4) for shard in partition_of(model, rank, 4)]
    weight = torch.cat([s.read() for s in shards if s.segment.tensor.name == "weight"])
    assert torch.equal(weight.view(3, 5), model.weight)


def test_names_are_those_of_the_checkpoint() -> None:
    compiled = torch.nn.Module()
    compiled._orig_mod = torch.nn.Linear(2, 2, bias=False)
    assert [s.segment.tensor.name for s in partition_of(compiled, 0, 1)] == ["weight"]
