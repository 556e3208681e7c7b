"""Checkpoints: the weights of each are a version before it is announced, and its mark names that version."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from tests.trainer.small import Editor, Improving, bits_of_folder, bits_of_version, small_trainer
from weightline.chain.files.checkpoint import VersionMark
from weightline.chain.read.history import Chain, open_chain
from weightline.store.local import LocalStore
from weightline.testing.faults import FaultStore, failing
from weightline.trainer.callback import WeightlineCallback


class _Announcer(TrainerCallback):
    """At `on_save`, notes the checkpoint's mark and the version that it names, as any other process sees them."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.seen: dict[str, tuple[VersionMark | None, bool]] = {}

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        mark, chain = VersionMark.read(folder), open_chain(self.url)
        holds = mark is not None and bits_of_version(chain, mark.version) == bits_of_folder(folder)
        assert mark is None or mark.commit_id == chain.manifest(mark.version).commit_id
        self.seen[folder.name] = (mark, holds)


class _Saver(TrainerCallback):
    """Decides at one event of step 3 to save."""

    def __init__(self, event: str) -> None:
        setattr(self, event, self._save)

    def _save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_save |= state.global_step == 3


_EVALUATED = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "eval_loss"}


@pytest.mark.parametrize(
    ("steps", "options"),
    [
        ([2, 4], {"save_strategy": "steps", "save_steps": 2}),
        ([1, 2, 3, 4], {"save_strategy": "best", **_EVALUATED}),
        ([1, 2, 3, 4], {"save_strategy": "steps", "save_steps": 1, "logging_steps": 1, **_EVALUATED}),
        ([8, 16], {"save_strategy": "epoch", "max_steps": 16}),
    ],
    ids=["steps", "best", "logged and evaluated", "epoch"],
)
@pytest.mark.parametrize("is_first", [True, False], ids=["before", "after"])
def test_every_checkpoint_is_a_version_when_it_is_announced(
    steps: list[int], options: dict[str, Any], is_first: bool, tmp_path: Path
) -> None:
    url = f"file://{tmp_path}/bucket/chain"
    ours, other = WeightlineCallback(url, sync_steps=5), _Announcer(url)
    small_trainer(
        tmp_path,
        *((other, ours) if is_first else (ours, other)),
        kind=Improving,
        **{"logging_strategy": "no"} | options,
    ).train()
    assert {name: holds for name, (_, holds) in other.seen.items()} == {f"checkpoint-{step}": True for step in steps}
    assert [mark.global_step for mark, _ in other.seen.values() if mark] == steps


@pytest.mark.parametrize("event", ["on_step_end", "on_log", "on_evaluate"])
def test_a_checkpoint_that_a_callback_asks_for_is_a_version(event: str, tmp_path: Path) -> None:
    url = f"file://{tmp_path}/bucket/chain"
    announcer = _Announcer(url)
    options = {"logging_steps": 1, **_EVALUATED}
    callbacks = (announcer, WeightlineCallback(url, sync_steps=10), _Saver(event))
    small_trainer(tmp_path, *callbacks, kind=Improving, **options).train()
    assert [(name, holds) for name, (_, holds) in announcer.seen.items()] == [("checkpoint-3", True)]


class _Averaging(TrainerCallback):
    """Puts other weights into the model for the checkpoint, and the trained ones back afterwards."""

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.trained = model.model.norm.weight.detach().clone()
        with torch.no_grad():
            model.model.norm.weight.mul_(0.5)

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        with torch.no_grad():
            model.model.norm.weight.copy_(self.trained)


@pytest.mark.parametrize("is_first", [True, False], ids=["before", "after"])
def test_weights_that_are_swapped_for_the_checkpoint_are_the_marked_ones(is_first: bool, tmp_path: Path) -> None:
    url = f"file://{tmp_path}/bucket/chain"
    ours, announcer = WeightlineCallback(url), _Announcer(url)
    callbacks = (_Averaging(), announcer, ours) if is_first else (ours, announcer, _Averaging())
    small_trainer(tmp_path, *callbacks, save_strategy="steps", save_steps=1, max_steps=2).train()
    for step in (1, 2):
        folder = tmp_path / "out" / f"checkpoint-{step}"
        mark = VersionMark.read(folder)
        assert mark is not None
        assert bits_of_version(open_chain(url), mark.version) == bits_of_folder(folder)


def test_a_checkpoint_written_twice_names_the_weights_that_it_holds_last(tmp_path: Path) -> None:
    """Strategies of steps and epochs may fall on one step, with a callback's edit in between."""
    url = f"file://{tmp_path}/bucket/chain"

    class SavingAtEpochs(TrainerCallback):
        def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_save = True

    callbacks = (WeightlineCallback(url), Editor("on_epoch_end"), SavingAtEpochs())
    small_trainer(tmp_path, *callbacks, save_strategy="steps", save_steps=8, max_steps=8).train()
    mark = VersionMark.read(tmp_path / "out" / "checkpoint-8")
    assert mark is not None
    assert bits_of_version(open_chain(url), mark.version) == bits_of_folder(tmp_path / "out" / "checkpoint-8")
    assert [(m.global_step, m.is_milestone) for m in open_chain(url).manifests(7)] == [
        (7, False), (8, True), (8, False), (8, True),
    ]  # fmt: skip


def test_a_checkpoint_whose_version_could_not_be_committed_gets_no_mark(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = FaultStore(LocalStore(tmp_path / "bucket"), lambda *_: None)
    callback = WeightlineCallback(f"file://{tmp_path}/bucket", on_publish_error="skip_and_record")
    callback.chain = Chain(store)

    class Failing(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            assert callback.session is not None
            callback.session.flush()
            # Step 2 and its checkpoint.
            times = 100 if state.global_step == 1 else 0
            store.plan = failing(verb="put_file", key_prefix="payloads/", times=times)

    small_trainer(tmp_path, callback, Failing(), save_strategy="steps", save_steps=2).train()
    assert VersionMark.read(tmp_path / "out" / "checkpoint-2") is None
    assert any("it gets no mark" in record.message for record in caplog.records)
    mark = VersionMark.read(tmp_path / "out" / "checkpoint-4")
    assert mark is not None
    assert bits_of_version(Chain(store.inner), mark.version) == bits_of_folder(tmp_path / "out" / "checkpoint-4")
