"""The end of training: whatever the weights are when `train` returns is the chain's last version, and a milestone."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import EarlyStoppingCallback, TrainerCallback

from tests.ranks import run_ranks_to_end
from tests.trainer import best_ranks
from tests.trainer.small import (
    Editor,
    Worsening,
    assert_ends_at_the_tip,
    bits_of_folder,
    bits_of_version,
    small_trainer,
)
from weightline.chain.files.checkpoint import VersionMark, write_checkpoint
from weightline.chain.read.history import open_chain
from weightline.chain.upkeep.verify import verify_chain
from weightline.errors import InputError
from weightline.trainer.callback import WeightlineCallback

_BEST = {
    "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1,
    "load_best_model_at_end": True, "metric_for_best_model": "eval_loss",
}  # fmt: skip


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"file://{tmp_path}/bucket/chain"


def test_the_best_model_that_is_loaded_at_the_end_is_the_last_version(url: str, tmp_path: Path) -> None:
    trainer = small_trainer(tmp_path, WeightlineCallback(url), kind=Worsening, **_BEST)
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "out" / "checkpoint-1")
    assert_ends_at_the_tip(trainer, url, tmp_path / "end")
    assert bits_of_folder(tmp_path / "end") == bits_of_folder(tmp_path / "out" / "checkpoint-1")
    chain = open_chain(url)
    # The last step's weights are a version, too, but no milestone; its numbers are not those of the best weights.
    assert [(m.global_step, m.is_milestone) for m in chain.manifests(4)] == [(4, False), (4, True)]
    assert chain.tip().metrics == {}
    assert verify_chain(chain).holds
    # A next stage goes on from the model at hand.
    small_trainer(tmp_path, WeightlineCallback(url, stage="dpo"), model=trainer.model, max_steps=1).train()
    assert [(m.stage, m.kind) for m in open_chain(url).manifests(6)] == [("dpo", "delta")]


@pytest.mark.train
def test_the_best_model_that_two_ranks_load_at_the_end_is_the_last_version(url: str, tmp_path: Path) -> None:
    run_ranks_to_end(best_ranks.main, [url, str(tmp_path)], tmp_path / "ranks.log")
    chain = open_chain(url)
    assert [(m.global_step, m.is_milestone, m.world_size) for m in chain.manifests()] == [
        (0, True, 2), (1, False, 2), (2, False, 2), (3, False, 2), (4, False, 2), (4, True, 2),
    ]  # fmt: skip
    best = bits_of_folder(tmp_path / "out" / "checkpoint-1")
    assert bits_of_version(chain, 5) == bits_of_folder(tmp_path / "end") == best
    assert bits_of_version(chain, 4) == bits_of_folder(tmp_path / "out" / "checkpoint-4") != best
    marks = [VersionMark.read(tmp_path / "out" / f"checkpoint-{step}") for step in range(1, 5)]
    assert [mark.version for mark in marks if mark] == [1, 2, 3, 4]
    assert verify_chain(chain).holds


@pytest.mark.parametrize("sync_steps", [1, 10])
def test_early_stopping_ends_with_a_milestone(sync_steps: int, url: str, tmp_path: Path) -> None:
    callbacks = (WeightlineCallback(url, sync_steps=sync_steps), EarlyStoppingCallback(1))
    trainer = small_trainer(tmp_path, *callbacks, kind=Worsening, **_BEST)
    trainer.train()
    assert trainer.state.global_step == 2
    assert_ends_at_the_tip(trainer, url, tmp_path / "end")


class _Stopper(TrainerCallback):
    """Ends training at one event of step 2."""

    def __init__(self, event: str) -> None:
        setattr(self, event, self._stop)

    def _stop(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop |= state.global_step == 2


@pytest.mark.parametrize("event", ["on_step_end", "on_log", "on_evaluate"])
def test_a_callback_that_stops_training_ends_it_with_a_milestone(event: str, url: str, tmp_path: Path) -> None:
    options = {"logging_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    trainer = small_trainer(tmp_path, WeightlineCallback(url), _Stopper(event), kind=Worsening, **options)
    trainer.train()
    assert trainer.state.global_step == 2
    assert_ends_at_the_tip(trainer, url, tmp_path / "end")


@pytest.mark.parametrize(
    ("sync_steps", "options"), [(3, {}), (3, {"max_steps": -1, "num_train_epochs": 1}), (1, {"max_steps": -1})]
)
def test_the_last_step_and_the_last_epoch_end_with_one_milestone(
    sync_steps: int, options: dict[str, Any], url: str, tmp_path: Path
) -> None:
    trainer = small_trainer(tmp_path, WeightlineCallback(url, sync_steps=sync_steps), **options)
    trainer.train()
    assert_ends_at_the_tip(trainer, url, tmp_path / "end")
    assert [m.global_step for m in open_chain(url).manifests() if m.is_milestone] == [0, trainer.state.global_step]


@pytest.mark.parametrize(
    ("event", "way"),
    [
        ("on_step_end", "in place"),
        ("on_log", "in place"),
        ("on_epoch_end", "data"),
        ("on_save", "in place"),
        ("on_train_end", "in place"),
        ("on_train_end", "data"),
        ("on_train_end", "another object"),
    ],
)
@pytest.mark.parametrize("is_first", [True, False], ids=["before", "after"])
def test_what_other_callbacks_do_to_the_weights_is_seen(
    event: str, way: str, is_first: bool, url: str, tmp_path: Path
) -> None:
    ours, other = WeightlineCallback(url, sync_steps=3), Editor(event, way)
    callbacks = (other, ours) if is_first else (ours, other)
    options = {"logging_steps": 2, "save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    trainer = small_trainer(tmp_path, *callbacks, **options)
    trainer.train()
    assert_ends_at_the_tip(trainer, url, tmp_path / "end")
    assert [type(c).__name__ for c in trainer.callback_handler.callbacks][-1] == "WeightlineCallback"
    assert verify_chain(open_chain(url)).holds


def test_a_callback_that_is_added_in_mid_training_is_seen(url: str, tmp_path: Path) -> None:
    class Adding(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 1:
                trainer.add_callback(Editor("on_step_end"))
            if state.global_step == 3:
                trainer.add_callback(Editor("on_train_end"))

    trainer = small_trainer(tmp_path, WeightlineCallback(url), Adding())
    trainer.train()
    assert_ends_at_the_tip(trainer, url, tmp_path / "end")
    assert [m.global_step for m in open_chain(url).manifests()] == [0, 1, 2, 3, 4, 4]


@pytest.mark.parametrize("event", ["on_step_end", "on_train_end"])
@pytest.mark.parametrize("is_first", [True, False], ids=["before", "after"])
def test_a_model_that_the_trainer_holds_in_the_place_of_another_one_is_seen(
    event: str, is_first: bool, url: str, tmp_path: Path
) -> None:
    class Averaging(TrainerCallback):
        """Gives the trainer another model object, as an average of weights."""

        def _replace(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            trainer.model = copy.deepcopy(trainer.model)
            trainer.model.generation_config.max_new_tokens = 70 + state.global_step
            with torch.no_grad():
                trainer.model.model.norm.weight.mul_(0.5)

    other = Averaging()
    setattr(other, event, other._replace)
    ours = WeightlineCallback(url)
    callbacks = (other, ours) if is_first else (ours, other)
    trainer = small_trainer(tmp_path, *callbacks, max_steps=2, save_strategy="steps", save_steps=1)
    trainer.train()
    assert_ends_at_the_tip(trainer, url, tmp_path / "end")
    chain = open_chain(url)
    for step in (1, 2):
        mark = VersionMark.read(tmp_path / "out" / f"checkpoint-{step}")
        assert mark is not None
        assert bits_of_version(chain, mark.version) == bits_of_folder(tmp_path / "out" / f"checkpoint-{step}")
    write_checkpoint(chain, chain.tip().version, tmp_path / "pulled")
    assert json.loads((tmp_path / "pulled" / "generation_config.json").read_text())["max_new_tokens"] == 72


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda model: model.resize_token_embeddings(40), r"model\.embed_tokens\.weight"),
        (lambda model: model.half(), r"model\.embed_tokens\.weight"),
        (lambda model: setattr(model.model.norm.weight, "data", torch.ones(20).bfloat16()), r"model\.norm\.weight"),
        (lambda model: setattr(model.model.norm.weight, "data", torch.ones(8).bfloat16()), r"model\.norm\.weight"),
        (lambda model: delattr(model.model.layers[0].mlp, "up_proj"), r"up_proj\.weight"),
    ],
    ids=["more rows", "another dtype", "more elements", "fewer elements", "a layer less"],
)
def test_a_model_that_becomes_another_one_is_refused_by_name(
    change: Callable[[Any], Any], named: str, url: str, tmp_path: Path
) -> None:
    class Changing(TrainerCallback):
        def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            change(model)

    with pytest.raises(Exception, match=rf"other tensors than before \(.*{named}"):
        small_trainer(tmp_path, WeightlineCallback(url), Changing(), max_steps=1).train()
    assert open_chain(url).tip().global_step == 1


@pytest.mark.parametrize("url_of_second", ["chain", "another"])
def test_two_callbacks_on_one_trainer_are_refused_by_name(url_of_second: str, url: str, tmp_path: Path) -> None:
    second = WeightlineCallback(f"file://{tmp_path}/bucket/{url_of_second}")
    trainer = small_trainer(tmp_path, WeightlineCallback(url), second)
    with pytest.raises(InputError, match="two callbacks of the kind WeightlineCallback"):
        trainer.train()
    assert not (tmp_path / "bucket").exists()
    assert trainer.pop_callback(WeightlineCallback) is not None
    trainer.train()
    assert open_chain(second.chain.url).tip().global_step == 4


def test_a_callback_that_another_one_calls_is_refused_by_name(url: str, tmp_path: Path) -> None:
    class Wrapping(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            WeightlineCallback(url).on_train_begin(*args, **kwargs)

    with pytest.raises(InputError, match="is called by another callback"):
        small_trainer(tmp_path, Wrapping()).train()


def test_a_small_file_that_changes_at_the_end_is_part_of_the_last_version(url: str, tmp_path: Path) -> None:
    class Configuring(TrainerCallback):
        def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            model.generation_config.max_new_tokens = 77

    trainer = small_trainer(tmp_path, WeightlineCallback(url), Configuring(), max_steps=1)
    trainer.train()
    assert_ends_at_the_tip(trainer, url, tmp_path / "end")
    chain = open_chain(url)
    write_checkpoint(chain, chain.tip().version, tmp_path / "pulled")
    assert json.loads((tmp_path / "pulled" / "generation_config.json").read_text())["max_new_tokens"] == 77
