"""Metrics belong to their step: a version carries those of its own, and later ones become a record beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import Trainer, TrainerCallback
from typer.testing import CliRunner

from tests.trainer.small import Worsening, small_trainer
from tests.trainer.test_session import Model
from tests.waiting import wait_until
from weightline.chain.files.checkpoint import VersionMark
from weightline.chain.read.history import Chain, open_chain
from weightline.chain.read.records import LOGGED, read_records
from weightline.chain.upkeep.verify import verify_chain
from weightline.cli.main import app
from weightline.lineage.read import read_lineage
from weightline.store.memory import MemoryStore
from weightline.trainer.callback import WeightlineCallback
from weightline.trainer.session import PublishSession
from weightline.trainer.settings import PublishSettings


def _losses(trainer: Trainer) -> dict[int, float]:
    return {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}


@pytest.mark.parametrize(("sync_steps", "logging_steps"), [(1, 1), (1, 2), (2, 1), (2, 3)])
def test_a_version_carries_the_numbers_of_its_own_step(sync_steps: int, logging_steps: int, tmp_path: Path) -> None:
    url = f"file://{tmp_path}/bucket/chain"
    callback = WeightlineCallback(url, sync_steps=sync_steps)
    trainer = small_trainer(tmp_path, callback, logging_steps=logging_steps, save_strategy="steps", save_steps=2)
    trainer.train()
    losses = _losses(trainer)
    assert len(losses) == 4 // logging_steps
    manifests = open_chain(url).manifests()
    found = {m.global_step: m.metrics.get("loss") for m in manifests if m.global_step > 0}
    assert found == {step: losses.get(step) for step in range(sync_steps, 5, sync_steps)}
    assert [m.is_milestone for m in manifests if m.global_step > 0] == [False] * (len(found) - 1) + [True]


def test_numbers_that_come_after_the_commit_are_a_record_beside_the_version(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/bucket/chain"
    callback = WeightlineCallback(url, run_id="mine", sync_steps=2)
    options = {"logging_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    trainer = small_trainer(tmp_path, callback, kind=Worsening, **options)
    trainer.evaluate()  # before its start
    trainer.train()
    chain = open_chain(url)
    before = len(read_records(chain, LOGGED))
    trainer.evaluate()  # after the end of training
    records = read_records(chain, LOGGED)
    assert len(records) == before + 1
    found = [(r["version"], r["global_step"], r["run_id"], "eval_loss" in r["metrics"]) for r in records]
    # Those of steps 1 and 3 belong to no version.
    assert found == [(1, 2, "mine", True), (2, 4, "mine", True), (2, 4, "mine", False), (2, 4, "mine", True)]
    assert records[0]["metrics"]["eval_loss"] == 2.0
    assert "train_runtime" in records[2]["metrics"]
    assert verify_chain(chain).holds
    rows = read_lineage(chain)
    assert [row.metrics.get("eval_loss") for row in rows] == [None, 2.0, 4.0]
    assert rows[1].metrics["loss"] == chain.manifest(1).metrics["loss"]
    shown = json.loads(CliRunner().invoke(app, ["show", url, "1", "--json"]).stdout)
    assert [record["metrics"]["eval_loss"] for record in shown[LOGGED]] == [2.0]
    assert shown["metrics"] == chain.manifest(1).metrics


def test_a_version_that_is_committed_late_in_its_step_carries_the_evaluation(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/bucket/chain"
    options = {
        "logging_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "best",
        "metric_for_best_model": "eval_loss",
    }  # fmt: skip
    trainer = small_trainer(tmp_path, WeightlineCallback(url, sync_steps=10), kind=Worsening, **options)
    trainer.train()
    first = open_chain(url).manifest(1)
    assert (first.global_step, first.metrics["eval_loss"], first.metrics["loss"]) == (1, 1.0, _losses(trainer)[1])
    mark = VersionMark.read(tmp_path / "out" / "checkpoint-1")
    assert mark is not None
    assert mark.version == 1


class _BreakingAtLog(TrainerCallback):
    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 2:
            raise ValueError("broke")


def test_a_version_whose_numbers_never_come_is_committed_without_them(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/bucket/chain"
    trainer = small_trainer(tmp_path, _BreakingAtLog(), WeightlineCallback(url), logging_steps=1)
    with pytest.raises(ValueError, match="broke"):
        trainer.train()
    wait_until(lambda: open_chain(url).tip_version() == 2)
    assert "loss" in open_chain(url).manifest(1).metrics
    assert open_chain(url).manifest(2).metrics == {}


@pytest.mark.parametrize("call", ["sync", "settle", "flush", "wait", "close"])
def test_no_call_waits_for_numbers_that_do_not_come(call: str) -> None:
    chain, model = Chain(MemoryStore()), Model()
    session = PublishSession(chain, PublishSettings())
    session.start(model)
    model.step(1)
    session.sync(1, metrics={"given": 1.0}, awaits_log=True)
    assert chain.tip_version() == 0
    {"sync": lambda: session.sync(2), "settle": lambda: session.settle(1)}.get(call, getattr(session, call))()
    session.close()
    assert chain.manifest(1).metrics == {"given": 1.0}
    assert verify_chain(chain).holds


def test_numbers_are_sorted_by_their_step() -> None:
    chain, model = Chain(MemoryStore()), Model()
    with PublishSession(chain, PublishSettings()) as session:
        session.start(model)
        session.log(0, {"at the start": 1.0})
        session.log(1, {"early": 1.0, "text": "none", "nan": float("nan"), "large": float("inf")})
        session.log(1, {"beyond all floats": 10**400})
        session.log(2, {"of another step": 1.0})
        session.log(1, {"late": 2.0})
        model.step(1)
        session.sync(1, awaits_log=True)
        session.log(1, {"loss": 3.0})
        session.log(1, {"eval_loss": 4.0})
        session.log(0, {"forgotten": 5.0})
    assert chain.manifest(1).metrics == {"late": 2.0, "loss": 3.0}
    records = [(r["version"], r["global_step"], r["metrics"]) for r in read_records(chain, LOGGED)]
    assert records == [(0, 0, {"at the start": 1.0}), (1, 1, {"eval_loss": 4.0})]
