"""The gate: a refresh goes before requests that wait, and waits for those inside."""

from __future__ import annotations

import threading

import pytest

from weightline.errors import ApplyError
from weightline.serving.http.gate import Gate

SOON = 5.0


class _Request(threading.Thread):
    """Passes the gate, says so, and stays inside until told."""

    def __init__(self, gate: Gate) -> None:
        super().__init__(daemon=True)
        self.gate, self.is_inside, self.may_leave = gate, threading.Event(), threading.Event()
        self.start()

    def run(self) -> None:
        with self.gate.request():
            self.is_inside.set()
            self.may_leave.wait(SOON)


def _close_in_background(gate: Gate) -> tuple[threading.Thread, threading.Event]:
    is_closed = threading.Event()

    def close() -> None:
        gate.close(SOON)
        is_closed.set()

    thread = threading.Thread(target=close, daemon=True)
    thread.start()
    while gate.is_open:
        pass
    return thread, is_closed


def test_a_refresh_waits_for_who_is_inside_and_goes_before_who_waits() -> None:
    gate = Gate()
    inside = _Request(gate)
    assert inside.is_inside.wait(SOON)
    waiting = _Request(gate)
    thread, is_closed = _close_in_background(gate)
    assert not is_closed.is_set()
    inside.may_leave.set()
    thread.join(SOON)
    assert is_closed.is_set()
    assert not waiting.is_inside.is_set()
    gate.open()
    assert waiting.is_inside.wait(SOON)
    waiting.may_leave.set()


def test_a_drain_that_takes_too_long_leaves_the_gate_open() -> None:
    gate = Gate()
    inside = _Request(gate)
    assert inside.is_inside.wait(SOON)
    with pytest.raises(ApplyError, match="1 requests were still running"):
        gate.close(0.01)
    inside.may_leave.set()
    inside.join(SOON)
    after = _Request(gate)
    assert after.is_inside.wait(SOON)
    after.may_leave.set()


def test_no_more_than_the_limit_are_inside() -> None:
    gate = Gate(max_in_flight=2)
    requests = [_Request(gate) for _ in range(3)]
    two = [one for one in requests if one.is_inside.wait(0.2)]
    assert len(two) == 2
    two[0].may_leave.set()
    (third,) = (one for one in requests if one not in two)
    assert third.is_inside.wait(SOON)
    for one in requests:
        one.may_leave.set()
