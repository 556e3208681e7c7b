"""Training again in one process: what an earlier training left under way is committed first, then it goes on."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

from tests.trainer.small import assert_ends_at_the_tip, small_model, small_trainer
from weightline.chain.read.history import Chain, open_chain
from weightline.chain.upkeep.verify import verify_chain
from weightline.errors import BaseMismatchError, PublishError
from weightline.store.local import LocalStore
from weightline.testing.faults import FaultStore
from weightline.trainer.callback import WeightlineCallback
from weightline.trainer.session import PublishSession


class _HeldStore(FaultStore):
    """Holds payloads of deltas back until an earlier session is being finished."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        super().__init__(LocalStore(folder), self._hold)
        self.is_held = False
        self._released = threading.Event()
        self.release = self._released.set
        finish = PublishSession.finish

        def release_and_finish(session: PublishSession) -> None:
            self.release()
            finish(session)

        patch.setattr(PublishSession, "finish", release_and_finish)

    def _hold(self, number: int, verb: str, key: str) -> None:
        if self.is_held and verb == "put_file" and key.startswith("payloads/"):
            self._released.wait()


class _Breaking(Trainer):
    """Raises `error` once, in the third training step: two steps have been captured, and their upload is under way."""

    error: BaseException
    store: _HeldStore
    num_calls = 0

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.num_calls += 1
        self.store.is_held = True
        if self.num_calls == 3:
            raise self.error
        return super().training_step(*args, **kwargs)


def _breaking(folder: Path, patch: pytest.MonkeyPatch, error: BaseException) -> type[_Breaking]:
    class Breaking(_Breaking):
        store = _HeldStore(folder / "bucket", patch)

    Breaking.error = error
    return Breaking


def _callback(folder: Path, store: _HeldStore, **settings: Any) -> WeightlineCallback:
    callback = WeightlineCallback(f"file://{folder}/bucket", **settings)
    callback.chain = Chain(store)
    return callback


def _assert_whole(folder: Path, trainer: Trainer, steps: list[int]) -> None:
    url = f"file://{folder}/bucket"
    assert [manifest.global_step for manifest in open_chain(url).manifests()] == steps
    assert_ends_at_the_tip(trainer, url, folder / "end")
    assert verify_chain(open_chain(url)).holds


def test_a_smaller_batch_after_an_out_of_memory_error_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = _breaking(tmp_path, monkeypatch, RuntimeError("CUDA out of memory."))
    callback = _callback(tmp_path, kind.store)
    trainer = small_trainer(tmp_path, callback, kind=kind, auto_find_batch_size=True)
    trainer.train()
    _assert_whole(tmp_path, trainer, [0, 1, 2, 1, 2, 3, 4])


@pytest.mark.parametrize("is_new_trainer", [False, True], ids=["same trainer", "another trainer"])
@pytest.mark.parametrize(
    ("sync_steps", "steps"), [(1, [0, 1, 2, 1, 2, 3, 4]), (10, [0, 0, 4])], ids=["every step", "between two versions"]
)
def test_an_interrupted_cell_is_run_again(
    is_new_trainer: bool, sync_steps: int, steps: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = _breaking(tmp_path, monkeypatch, KeyboardInterrupt())
    trainer = small_trainer(tmp_path, _callback(tmp_path, kind.store, sync_steps=sync_steps), kind=kind)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    if is_new_trainer:
        trainer = small_trainer(tmp_path, _callback(tmp_path, kind.store, sync_steps=sync_steps), model=trainer.model)
    trainer.train()
    _assert_whole(tmp_path, trainer, steps)


def test_a_cell_that_is_run_again_after_the_session_has_ended_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = _breaking(tmp_path, monkeypatch, KeyboardInterrupt())
    callback = _callback(tmp_path, kind.store, sync_steps=10)
    trainer = small_trainer(tmp_path, callback, kind=kind)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert callback.session is not None
    callback.session._publisher._thread.join()
    trainer.train()
    _assert_whole(tmp_path, trainer, [0, 0, 4])


def test_other_weights_are_refused_after_a_training_that_came_to_its_end(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/bucket"
    trainer = small_trainer(tmp_path, WeightlineCallback(url), max_steps=1)
    trainer.train()
    with torch.no_grad():
        trainer.model.model.norm.weight.add_(1)
    with pytest.raises(BaseMismatchError, match="name a new chain"):
        trainer.train()
    # So are another model's after one that did not.
    with pytest.raises(BaseMismatchError, match="name a new chain"):
        small_trainer(tmp_path, WeightlineCallback(url), model=small_model(), max_steps=1).train()


def test_two_trainers_train_one_chain_one_after_the_other(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/bucket"
    callback = WeightlineCallback(url)
    first = small_trainer(tmp_path, callback, max_steps=2)
    first.train()
    second = small_trainer(tmp_path, callback, model=first.model, max_steps=2)
    second.train()
    _assert_whole(tmp_path, second, [0, 1, 2, 1, 2])


def test_a_version_that_is_never_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = _breaking(tmp_path, monkeypatch, KeyboardInterrupt())
    callback = _callback(tmp_path, kind.store, timeout_seconds=0.1)
    trainer = small_trainer(tmp_path, callback, kind=kind)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    monkeypatch.undo()  # nothing releases the store
    try:
        with pytest.raises(PublishError, match=r"still writes a version of .* after 0\.1 s"):
            trainer.train()
    finally:
        kind.store.release()
