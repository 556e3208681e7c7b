"""Where a loader puts each element of a checkpoint, learnt without writing anything."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch

from tests.serving.engines.sharded import SHAPES, WIDTH, FusedModel
from weightline.errors import ApplyError
from weightline.serving.engines.vllm.mapping import Box, Placement, assign_boxes, box_from_json, learn_placement
from weightline.types import TensorSpec

SPECS = {name: TensorSpec(name, "I32", shape) for name, shape in SHAPES.items()}


def _filled(rank: int, world_size: int) -> FusedModel:
    """Loaded with numbers that say of each element which it is: tensor * 1000 + position."""
    model = FusedModel(rank, world_size, torch.int32)
    model.load_weights(_numbered())
    return model


def _numbered() -> Iterable[tuple[str, torch.Tensor]]:
    for number, (name, shape) in enumerate(SHAPES.items(), 1):
        count = int(np.prod(shape))
        yield name, (torch.arange(count, dtype=torch.int32) + 1000 * number).reshape(shape)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_element_is_where_the_loader_put_it(world_size: int) -> None:
    """The places are learnt on one model and looked up in another that really was loaded."""
    learnt = [learn_placement(FusedModel(rank, world_size, torch.int32), SPECS) for rank in range(world_size)]
    for rank, placement in enumerate(learnt):
        loaded = learn_placement(_filled(rank, world_size), SPECS)
        for number, name in enumerate(SHAPES, 1):
            positions = torch.arange(SPECS[name].num_elements)
            assert [place.box for place in placement[name]] == [place.box for place in loaded[name]]
            for place in loaded[name]:
                found, at = place.locate(positions)
                assert (place.flat[at] == positions[found] + 1000 * number).all()
                assert int(found.sum()) == place.box.num_elements
                runs = [p for run in place.box.runs(SPECS[name]) for p in range(run.start, run.stop)]
                assert place.view().reshape(-1).tolist() == [p + 1000 * number for p in runs]
    boxes = [_boxes(placement) for placement in learnt]
    assigned = assign_boxes(SPECS, boxes)
    for name, spec in SPECS.items():
        counts = np.zeros(spec.num_elements, int)
        for rank, chosen in enumerate(assigned):
            for number in chosen.get(name, []):
                for run in boxes[rank][name][number].runs(spec):
                    counts[run.start : run.stop] += 1
        assert (counts == 1).all(), name
    assert "norm.weight" in assigned[0]
    assert all("norm.weight" not in chosen for chosen in assigned[1:])


def _boxes(placement: Placement) -> dict[str, list[Box]]:
    return {name: [box_from_json(place.box.to_json()) for place in places] for name, places in placement.items()}


def test_learning_writes_nothing() -> None:
    model = _filled(0, 2)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    learn_placement(model, SPECS)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])


class _Loader(torch.nn.Module):
    """One parameter, filled as the test says."""

    def __init__(self, load: Any, shape: tuple[int, ...] = (4, WIDTH), dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(shape, dtype=dtype), requires_grad=False)
        self._load = load

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        for _, loaded in weights:
            self._load(self.w, loaded)


def _copy(w: torch.nn.Parameter, loaded: torch.Tensor) -> None:
    w.data.copy_(loaded)


def _replace(w: torch.nn.Parameter, loaded: torch.Tensor) -> None:
    w.data = loaded.clone()


REFUSED = {
    "arithmetic": (_Loader(lambda w, loaded: w.data.copy_(loaded + 1)), "computes w from w"),
    "in place arithmetic": (_Loader(lambda w, loaded: w.data.add_(loaded)), r"computes w from w.weight \(aten::add_\)"),
    "broadcast": (_Loader(lambda w, loaded: w.data.copy_(loaded[:1])), "spreads w.weight"),
    "cast": (_Loader(_copy, dtype=torch.float32), "holds w.weight as F32, the chain as BF16"),
    "replaced": (_Loader(_replace), "replaces parameters instead of filling them"),
    "ignored": (_Loader(lambda w, loaded: None), "no tensor of the chain fills the engine's w"),
    "too small": (_Loader(_copy, shape=(4, 3)), "spreads w.weight"),
    "packed": (_Loader(_copy, shape=(0,)), r"spreads w.weight \(4, 8\) over w \(0,\)"),
    "no loader": (torch.nn.Linear(2, 2), "has no load_weights"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_refreshed_in_place_is_refused_by_name(case: str) -> None:
    model, message = REFUSED[case]
    with pytest.raises(ApplyError, match=message):
        learn_placement(model, {"w.weight": TensorSpec("w.weight", "BF16", (4, WIDTH))})


def test_a_transposed_copy_is_no_obstacle() -> None:
    model = _Loader(lambda w, loaded: w.data.copy_(loaded.t()), shape=(WIDTH, 4))
    (place,) = learn_placement(model, {"w.weight": TensorSpec("w.weight", "BF16", (4, WIDTH))})["w.weight"]
    found, at = place.locate(torch.arange(4 * WIDTH))
    assert found.all()
    assert at.tolist() == [column * 4 + row for row in range(4) for column in range(WIDTH)]


def test_a_matrix_that_was_computed_from_a_parameter_is_refused() -> None:
    model = _Loader(_copy)
    model.kv_cache = torch.zeros(2, 2)
    learn_placement(model, {"w.weight": TensorSpec("w.weight", "BF16", (4, WIDTH))})
    model.absorbed = model.w.detach().t().contiguous()
    with pytest.raises(ApplyError, match=r"keeps \.absorbed \(8, 4\) beside its parameters"):
        learn_placement(model, {"w.weight": TensorSpec("w.weight", "BF16", (4, WIDTH))})


def test_two_tensors_in_one_memory_are_refused() -> None:
    specs = {name: TensorSpec(name, "BF16", (4, WIDTH)) for name in ("a", "b")}
    with pytest.raises(ApplyError, match="b shares memory with another tensor"):
        learn_placement(_Loader(_copy), specs)


def test_elements_that_are_nowhere_or_twice_are_found() -> None:
    spec = TensorSpec("w", "BF16", (4, 2))
    half = Box(0, (2, 2), (2, 1))
    with pytest.raises(ApplyError, match="element 4 of w is in 0 places"):
        assign_boxes({"w": spec}, [{"w": [half]}])
    with pytest.raises(ApplyError, match="element 2 of w is in 2 places"):
        assign_boxes({"w": spec}, [{"w": [half]}, {"w": [Box(2, (3, 2), (2, 1))]}])
    with pytest.raises(ApplyError, match="holds no part of"):
        assign_boxes({"w": spec}, [{}])
