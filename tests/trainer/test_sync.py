"""The publisher's thread: what it is asked to do beside the syncs, and its end."""

from __future__ import annotations

import logging
import threading

import pytest

from tests.waiting import PATIENCE_SECONDS
from weightline.trainer.sync import Sync, SyncOutcome, SyncPublisher


def _committed(sync: Sync) -> SyncOutcome:
    return SyncOutcome(sync.sequence, sync.sequence, "committed")


def _sync(sequence: int) -> Sync:
    return Sync(sequence, 0, sequence, "delta")


def test_a_slow_call_delays_no_sync_and_is_waited_for_at_the_end() -> None:
    publisher, may_end, done = SyncPublisher(_committed), threading.Event(), []

    def slow() -> None:
        assert may_end.wait(PATIENCE_SECONDS)
        done.append(publisher.outcome(0).version)

    publisher.submit(_sync(0))
    publisher.call(slow)
    publisher.call(lambda: done.append("after it"))
    publisher.submit(_sync(1))
    publisher.wait_for(2)
    assert done == []
    may_end.set()
    assert publisher.close(PATIENCE_SECONDS)
    assert done == [0, "after it"]
    assert publisher.close(0)


def test_a_call_that_takes_too_long_at_the_end_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    publisher, may_end = SyncPublisher(_committed), threading.Event()
    publisher.call(lambda: may_end.wait(PATIENCE_SECONDS))
    with caplog.at_level(logging.WARNING):
        assert publisher.close(1.0)
    assert "records beside the last versions were not written within 1 s" in caplog.text
    may_end.set()
    assert publisher.close(PATIENCE_SECONDS)
