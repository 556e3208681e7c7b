"""The number of the weights at hand, before their version is committed; and records beside the version they become."""

from __future__ import annotations

from threading import Event

import pytest

from tests.trainer.test_session import Model
from weightline.chain.read.history import Chain
from weightline.chain.read.records import ROLLOUTS, read_records
from weightline.store.memory import MemoryStore
from weightline.testing.faults import FaultStore
from weightline.trainer.session import PublishSession
from weightline.trainer.settings import PublishSettings


def test_the_present_version_is_known_while_its_commit_is_under_way() -> None:
    may_commit = Event()

    def hold(operation: str, key: str) -> None:
        if key.endswith("000001.json"):
            may_commit.wait()

    chain, model = Chain(FaultStore(MemoryStore(), lambda operation, key, *_: hold(operation, key))), Model()
    with PublishSession(chain, PublishSettings(max_in_flight=2)) as session:
        session.start(model)
        assert (session.present_version, session.start_version, session.stands_for) == (0, 0, None)
        for step in (1, 2):
            model.step(step)
            session.sync(step)
            assert session.present_version == step
        assert session.committed == (0,)
        may_commit.set()
        session.flush()
        assert session.present_version == chain.tip_version() == 2
        assert session.committed == (0, 1, 2)


def test_a_resumed_training_says_what_its_first_version_stands_for() -> None:
    chain = Chain(MemoryStore())
    for trained_to, resumed_at, expected in [(3, 0, (0, None)), (2, 1, (4, 1))]:
        model = Model()
        for step in range(1, resumed_at + 1):
            model.step(step)
        with PublishSession(chain, PublishSettings()) as session:
            session.start(model, None, resumed_at)
            assert (session.start_version, session.stands_for) == expected
            for step in range(resumed_at + 1, trained_to + 1):
                model.step(step)
                session.sync(step)


@pytest.mark.parametrize("due", [1, 2])
def test_a_note_is_written_beside_the_version_that_the_weights_become(due: int) -> None:
    chain, model = Chain(MemoryStore()), Model()
    with PublishSession(chain, PublishSettings()) as session:
        session.start(model)
        for step in (1, 2, 3):
            model.step(step)
            session.note(ROLLOUTS, f"grpo-{step}", {"status": "done", "global_step": step})
            if step >= due:
                session.sync(step)
    records = [(record["version"], record["name"]) for record in read_records(chain, ROLLOUTS)]
    assert records == [(max(1, step - due + 1), f"grpo-{step}") for step in (1, 2, 3)]
