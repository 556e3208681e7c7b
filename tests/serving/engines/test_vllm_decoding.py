"""Workers that decode payloads against their own memory: what they stage, what they keep, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.serving.engines.served import Served
from tests.serving.engines.sharded import WIDTH, FusedModel
from weightline.errors import ApplyError, BaseMismatchError, DigestMismatchError, PayloadError
from weightline.format.write_payload import write_delta
from weightline.serving.engines.vllm.group import WorkerDecoding
from weightline.serving.engines.vllm.mapping import Box, is_each_held_once
from weightline.serving.engines.vllm.memory import StagedChanges
from weightline.serving.replica.prepare import PreparedDelta
from weightline.types import TensorSpec


@pytest.fixture
def served(serve: Callable[..., Served]) -> Served:
    return serve(1, "gap-by-magnitude")


def _staged(served: Served, version: int, *, decodes: bool) -> tuple[StagedChanges, PreparedDelta]:
    """Prepares and stages a version, by the workers themselves or from bits that are read from them."""
    served.engine._workers.can_decode = decodes
    prepared = served.replica.prepare(version)
    assert isinstance(prepared, PreparedDelta)
    assert isinstance(prepared.changes, WorkerDecoding) == decodes
    served.engine.stage(prepared.changes)
    staged = served.transport.workers[0]._staged
    assert staged is not None
    return staged, prepared


@pytest.mark.parametrize(
    ("coding", "start", "version"),
    [(coding, 0, version) for coding in ("gap", "gap-by-magnitude") for version in (1, 2)]
    + [("gap", 2, version) for version in (1, 0)],
)
def test_a_worker_stages_what_is_staged_from_bits_that_were_read(
    coding: str, start: int, version: int, serve: Callable[..., Served]
) -> None:
    """One hop and several, forward and, where the coding allows it, backward."""
    served = serve(1, coding)
    served.replica.refresh(start)
    own, prepared = _staged(served, version, decodes=True)
    sent, expected = _staged(served, version, decodes=False)
    assert (prepared.num_changed, prepared.digests) == (expected.num_changed, expected.digests)
    assert (own.num_elements, own.digests) == (sent.num_elements, sent.digests)
    assert own.num_elements == expected.num_changed > 0
    by_name = {one.name: one for one in sent.boxes}
    assert by_name.keys() == {one.name for one in own.boxes}
    for one in own.boxes:
        for column in ("flat", "at_K", "old_K", "new_K"):
            assert torch.equal(getattr(one, column), getattr(by_name[one.name], column)), (one.name, column)


def test_neither_bits_nor_changes_pass_through_shared_memory(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = served.transport.workers[0]
    monkeypatch.setattr(worker, "read_bits", None)
    monkeypatch.setattr(worker, "stage", None)
    served.replica.refresh(2)
    monkeypatch.undo()
    served.assert_at(2)


def test_a_tensor_that_two_workers_hold_is_read_and_sent(serve: Callable[..., Served]) -> None:
    served = serve(2)
    assert served.engine.begin_decoding() is None


def test_the_rule_for_decoding_in_the_workers() -> None:
    spec = TensorSpec("w", "BF16", (4, 2))
    whole, half = Box(0, (8,), (1,)), Box(4, (4,), (1,))
    other = TensorSpec("other", "BF16", (8,))
    specs = {"w": spec, "other": other}
    assert is_each_held_once(specs, [{"w": [whole, whole], "other": [whole]}])
    assert is_each_held_once(specs, [{"w": [whole]}, {"w": [], "other": [whole]}])
    assert not is_each_held_once(specs, [{"w": [whole], "other": [whole]}, {"other": [whole]}])
    assert not is_each_held_once(specs, [{"w": [whole], "other": [half]}, {"other": [half]}])


def test_parts_of_a_tensor_that_lie_apart_are_decoded_as_well(
    serve: Callable[..., Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The experts lie column by column, so that their bits are no view of the memory and their addresses no sum."""

    def transposed(model: FusedModel, rank: int, world_size: int, dtype: torch.dtype = torch.bfloat16) -> None:
        original(model, rank, world_size, dtype)
        columns = torch.zeros(2, WIDTH, 3, dtype=dtype)
        model.experts = torch.nn.Parameter(columns.transpose(1, 2), requires_grad=False)

    original = FusedModel.__init__
    monkeypatch.setattr(FusedModel, "__init__", transposed)
    served = serve(1, "gap-by-magnitude")
    assert served.engine.begin_decoding() is not None
    for version in (2, 0):
        served.replica.refresh(version, allow_backward=True)
        served.assert_at(version)


def test_a_damaged_payload_keeps_nothing(served: Served) -> None:
    payload = served.chain.manifest(1).payloads[0]
    raw = bytearray(served.chain.store.get(payload.key))
    raw[-9] ^= 4
    served.chain.store.put(payload.key, bytes(raw))
    with pytest.raises(DigestMismatchError, match="sha256"):
        served.replica.refresh(1)
    assert served.transport.workers[0]._decoded is None
    served.assert_at(0)


def test_an_error_of_the_decoding_keeps_its_type(served: Served, tmp_path: Path) -> None:
    decoding = served.engine.begin_decoding()
    assert decoding is not None
    (tmp_path / "broken").write_bytes(b"no payload")
    with pytest.raises(PayloadError):
        decoding.apply([tmp_path / "broken"], is_backward=False)
    with pytest.raises(ApplyError, match="cannot be read by an engine's worker"):
        decoding.apply([tmp_path / "elsewhere"], is_backward=False)
    assert not decoding.is_kept
    served.replica.refresh(1)
    served.assert_at(1)


def test_a_payload_of_another_base_is_refused_and_nothing_of_it_is_kept(served: Served) -> None:
    """The memory is not the version's: steps lead to a state with other digests, or to positions beyond a tensor."""
    served.transport.models[0].o.data.fill_(1)
    with pytest.raises((DigestMismatchError, PayloadError)):
        served.replica.prepare(1)
    assert served.engine._workers.kept is None
    assert served.transport.workers[0]._decoded is None


def test_an_empty_delta_is_applied(served: Served, tmp_path: Path) -> None:
    write_delta(tmp_path / "empty", [])
    decoding = served.engine.begin_decoding()
    assert decoding is not None
    assert decoding.apply([tmp_path / "empty"], is_backward=False) == {}
    assert decoding.num_changed == 0
    served.engine.stage(decoding)
    served.engine.write_staged()
    served.assert_at(0)


def test_only_what_was_prepared_last_can_be_applied(served: Served) -> None:
    first, second = served.replica.prepare(1), served.replica.prepare(2)
    with pytest.raises(BaseMismatchError, match="prepare it again"):
        served.replica.apply(first)
    served.assert_at(0)
    served.replica.apply(second)
    served.assert_at(2)
    with pytest.raises(BaseMismatchError, match="prepare it again"):
        served.replica.apply(second)
    served.assert_at(2)


def test_what_is_not_applied_is_dropped(served: Served) -> None:
    prepared = served.replica.prepare(1)
    assert served.transport.workers[0]._decoded is not None
    prepared.discard()
    prepared.discard()
    assert served.transport.workers[0]._decoded is None
    with pytest.raises(BaseMismatchError, match="prepare it again"):
        served.replica.apply(prepared)
    served.replica.refresh(1)
    served.assert_at(1)


def test_a_load_drops_what_was_decoded(served: Served) -> None:
    prepared = served.replica.prepare(2)
    assert isinstance(prepared, PreparedDelta)
    served.replica._held = None
    served.replica.refresh(1)
    assert not prepared.is_kept
    served.assert_at(1)


class _GoneError(RuntimeError):
    pass


def test_a_worker_that_dies_while_it_decodes_leaves_an_error_and_the_version(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = served.transport.workers[0]

    def die(**_: object) -> None:
        raise _GoneError

    monkeypatch.setattr(worker, "decode", die)
    with pytest.raises(ApplyError, match="GoneError"):
        served.replica.refresh(1)
    monkeypatch.undo()
    served.assert_at(0)
    served.replica.refresh(1)
    served.assert_at(1)


def test_a_worker_that_lost_the_first_step_refuses_the_second(served: Served, tmp_path: Path) -> None:
    write_delta(tmp_path / "empty", [])
    decoding = served.engine.begin_decoding()
    assert decoding is not None
    decoding.apply([tmp_path / "empty"], is_backward=False)
    served.transport.workers[0]._decoded = None
    with pytest.raises(ApplyError, match="does not keep the changes"):
        decoding.apply([tmp_path / "empty"], is_backward=False)
    assert not decoding.is_kept


def test_a_write_that_fails_is_undone(served: Served) -> None:
    calls: list[int] = []

    def fail(rank: int) -> None:
        calls.append(rank)
        if len(calls) == 1:
            raise _GoneError

    served.transport.on_write = fail
    with pytest.raises(ApplyError, match="GoneError"):
        served.replica.refresh(2)
    served.assert_at(0)
    np.testing.assert_equal(len(calls), 2)
