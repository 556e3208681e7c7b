"""Errors beside training: every rank hears of them at once, and what ends training ends publishing."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from tests.ranks import run_ranks_to_end
from tests.trainer.failure_ranks import BROKEN, main
from tests.trainer.small import small_trainer
from tests.trainer.test_session import Model
from tests.waiting import wait_until
from weightline.chain.files.checkpoint import VersionMark
from weightline.chain.read.history import Chain, open_chain
from weightline.chain.upkeep.verify import verify_chain
from weightline.errors import PublishError
from weightline.store.memory import MemoryStore
from weightline.testing.faults import FaultStore
from weightline.trainer.callback import WeightlineCallback
from weightline.trainer.session import PublishSession
from weightline.trainer.settings import PublishSettings


def _publishers() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "weightline-publisher"}


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """What both ranks saw in every scenario. Each waits 1800 s for the other, unless it hears of the error."""
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks_to_end(main, [str(folder)], folder / "log")
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.train
@pytest.mark.parametrize(
    ("scenario", "reason"),
    [
        ("capture", "rank 1: MemoryError: no room"),
        ("encode", "rank 1: ValueError: no such table"),
        ("upload", "rank 1: KeyError: 'payload'"),
        ("commit", "commit: ValidationError: 1 validation error for _Number"),
    ],
)
def test_an_error_of_any_kind_on_one_rank_is_raised_on_both(
    seen: list[dict[str, str]], scenario: str, reason: str
) -> None:
    for errors in seen:
        assert errors[scenario].startswith("PublishError: version 1 (step 1) could not be committed: ")
        assert reason in errors[scenario]


@pytest.mark.train
def test_a_rank_that_ends_ends_the_others(seen: list[dict[str, str]]) -> None:
    assert seen[0]["none"] == seen[1]["none"] == "no error"
    assert seen[1]["loop"] == "RuntimeError: the user's callback broke"
    assert seen[0]["loop"].startswith("PublishError: ")
    assert seen[1]["thread"].startswith("PublishError: the publisher thread crashed: SystemExit(3)")
    assert seen[0]["thread"].startswith("PublishError: ")
    assert seen[1]["start"] == "MemoryError: no room"
    assert seen[0]["start"] == "PublishError: rank 1: MemoryError: no room"


class _Breaking(TrainerCallback):
    """A user's callback that raises before the third step."""

    def __init__(self, error: BaseException) -> None:
        self._error = error

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 2:
            raise self._error


@pytest.mark.parametrize("error", [ValueError("broke"), MemoryError("no room"), KeyboardInterrupt()], ids=repr)
def test_an_error_in_the_training_loop_ends_publishing(error: BaseException, tmp_path: Path) -> None:
    before = _publishers()
    url = f"file://{tmp_path}/bucket/chain"
    callback = WeightlineCallback(url)
    with pytest.raises(type(error)):
        small_trainer(tmp_path, callback, _Breaking(error)).train()
    wait_until(lambda: _publishers() <= before)
    assert callback.session is not None
    with pytest.raises(PublishError, match="closed"):
        callback.session.sync(3)
    chain = open_chain(url)
    assert [manifest.global_step for manifest in chain.manifests()] == [0, 1, 2]
    assert verify_chain(chain).holds
    # The same process may train again.
    small_trainer(tmp_path, WeightlineCallback(f"{url}-2")).train()
    assert open_chain(f"{url}-2").tip().global_step == 4


def test_the_callback_says_where_it_commits_and_what_it_committed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    url = f"file://{tmp_path}/bucket/chain"
    with caplog.at_level("INFO", logger="weightline.trainer.callback"):
        small_trainer(tmp_path, WeightlineCallback(url, run_id="mine", sync_steps=2)).train()
    chain = open_chain(url)
    nbytes = sum(manifest.payload_nbytes for manifest in chain.manifests())
    assert [record.message for record in caplog.records if record.name == "weightline.trainer.callback"] == [
        f"weightline: run mine commits to {chain.url} (which is empty), every 2 optimizer steps",
        f"weightline: committed versions 0..2, {nbytes:,} bytes of payloads, to {chain.url}",
    ]


def test_a_checkpoint_names_its_version_and_training_resumes_from_it(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/bucket/chain"
    trainer = small_trainer(tmp_path, WeightlineCallback(url, run_id="mine"), save_strategy="steps", save_steps=2)
    trainer.train()
    chain = open_chain(url)
    folder = tmp_path / "out" / "checkpoint-2"
    assert VersionMark.read(folder) == VersionMark.of(chain, chain.manifest(2))
    assert json.loads((folder / "weightline.json").read_text()) == {
        "chain": chain.url, "version": 2, "commit_id": chain.manifest(2).commit_id, "run_id": "mine",
        "stage": "train", "global_step": 2,
    }  # fmt: skip
    again = small_trainer(tmp_path, WeightlineCallback(url, run_id="mine"))
    again.train(resume_from_checkpoint=str(folder))
    kinds = [(manifest.kind, manifest.reverts_to, manifest.global_step) for manifest in open_chain(url).manifests(5)]
    assert kinds == [("revert", 2, 2), ("delta", None, 3), ("delta", None, 4)]
    # The resumed run ends in the very bits of the first one.
    assert open_chain(url).tip().digests == chain.manifest(4).digests


def test_a_failed_capture_leaves_the_baseline_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    chain, model = Chain(MemoryStore()), Model()
    from weightline.trainer import baseline

    with PublishSession(chain, PublishSettings(on_publish_error="skip_and_record")) as session:
        session.start(model)
        model.step(1)
        calls = []

        def fail_at_the_second(*arguments: Any, **options: Any) -> Any:
            calls.append(1)
            if len(calls) == 2:
                raise MemoryError("no room")
            return whole(*arguments, **options)

        whole = baseline.capture_tensor
        with monkeypatch.context() as patch:
            patch.setattr(baseline, "capture_tensor", fail_at_the_second)
            session.sync(1)
        session.flush()
        assert chain.tip_version() == 0
        model.step(2)
        session.sync(2)
        session.flush()
    assert chain.tip_version() == 1
    assert verify_chain(chain).holds
    # Start anew: the loaded weights are the tip to the last bit.
    with PublishSession(chain, PublishSettings()) as session:
        assert session.start(model).action == "continue"


def test_closing_waits_no_longer_than_its_limit(caplog: pytest.LogCaptureFixture) -> None:
    released = threading.Event()

    def stand_still(number: int, verb: str, key: str) -> None:
        if verb == "put_file":
            released.wait()

    store = FaultStore(MemoryStore(), lambda *_: None)
    session = PublishSession(Chain(store), PublishSettings(close_seconds=0.1))
    model = Model()
    session.start(model)
    store.plan = stand_still
    model.step(1)
    session.sync(1)
    session.close()
    assert any("was not finished within 0.1 s" in record.message for record in caplog.records)
    released.set()
    wait_until(lambda: Chain(store.inner).tip_version() == 1)


def test_every_scenario_is_looked_at() -> None:
    assert set(BROKEN) == {"capture", "encode", "upload", "commit", "thread", "loop", "none"}
