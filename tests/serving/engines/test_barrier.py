"""The request barrier, on threads and on a loop: a refresh goes first, and waits for the requests inside."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from weightline.errors import ApplyError
from weightline.serving.engines.barrier import AsyncRequestBarrier, RequestBarrier

SOON = 5.0


class _Request(threading.Thread):
    """Passes the barrier, says so, and stays inside until it may leave."""

    def __init__(self, barrier: RequestBarrier) -> None:
        super().__init__(daemon=True)
        self.barrier, self.is_inside, self.may_leave = barrier, threading.Event(), threading.Event()
        self.start()

    def run(self) -> None:
        with self.barrier.request():
            self.is_inside.set()
            self.may_leave.wait(SOON)


def _drain_in_background(barrier: RequestBarrier) -> tuple[threading.Thread, threading.Event]:
    is_drained = threading.Event()

    def drain() -> None:
        barrier.drain(SOON)
        is_drained.set()

    thread = threading.Thread(target=drain, daemon=True)
    thread.start()
    while barrier.is_open:
        pass
    return thread, is_drained


def test_a_refresh_waits_for_who_is_inside_and_goes_before_who_waits() -> None:
    barrier = RequestBarrier()
    inside = _Request(barrier)
    assert inside.is_inside.wait(SOON)
    waiting = _Request(barrier)
    thread, is_drained = _drain_in_background(barrier)
    assert not is_drained.is_set()
    inside.may_leave.set()
    thread.join(SOON)
    assert is_drained.is_set()
    assert not waiting.is_inside.is_set()
    barrier.release()
    assert waiting.is_inside.wait(SOON)
    waiting.may_leave.set()


def test_a_drain_that_takes_too_long_lets_requests_pass_again() -> None:
    barrier = RequestBarrier()
    inside = _Request(barrier)
    assert inside.is_inside.wait(SOON)
    with pytest.raises(ApplyError, match="1 requests were still running"):
        barrier.drain(0.01)
    inside.may_leave.set()
    inside.join(SOON)
    after = _Request(barrier)
    assert after.is_inside.wait(SOON)
    after.may_leave.set()


def test_no_more_than_the_limit_are_inside() -> None:
    barrier = RequestBarrier(max_in_flight=2)
    requests = [_Request(barrier) for _ in range(3)]
    two = [one for one in requests if one.is_inside.wait(0.2)]
    assert len(two) == 2
    two[0].may_leave.set()
    (third,) = (one for one in requests if one not in two)
    assert third.is_inside.wait(SOON)
    for one in requests:
        one.may_leave.set()


def test_on_a_loop_a_refresh_waits_for_those_inside_and_holds_the_others_back() -> None:
    async def scene() -> list[str]:
        barrier, events = AsyncRequestBarrier(), []

        async def request(name: str, seconds: float, *, is_counted: bool = True) -> None:
            async with barrier.passing(is_counted=is_counted):
                events.append(f"{name} in")
                await asyncio.sleep(seconds)
                events.append(f"{name} out")

        def refresh() -> None:
            barrier.drain(5)
            events.append("closed")
            time.sleep(0.1)
            events.append("open")
            barrier.release()

        first = asyncio.create_task(request("first", 0.1))
        mixing = asyncio.create_task(request("mixing", 0.4, is_counted=False))
        await asyncio.sleep(0.02)
        refreshing = asyncio.create_task(asyncio.to_thread(refresh))
        await asyncio.sleep(0.02)
        late = asyncio.create_task(request("late", 0))
        await asyncio.gather(first, mixing, refreshing, late)
        return events

    events = asyncio.run(scene())
    assert events == ["first in", "mixing in", "first out", "closed", "open", "late in", "late out", "mixing out"]


def test_on_a_loop_a_request_that_is_cancelled_leaves() -> None:
    async def scene() -> None:
        barrier = AsyncRequestBarrier()

        async def request() -> None:
            async with barrier.passing():
                await asyncio.sleep(60)

        task = asyncio.create_task(request())
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.to_thread(barrier.drain, 1)

    asyncio.run(scene())


def test_on_a_loop_a_drain_that_takes_too_long_lets_requests_pass_again() -> None:
    async def scene() -> None:
        barrier = AsyncRequestBarrier()
        async with barrier.passing():
            with pytest.raises(ApplyError, match=r"1 requests were still running after 0\.05 s"):
                await asyncio.to_thread(barrier.drain, 0.05)
        async with barrier.passing():
            pass

    asyncio.run(scene())


def test_threads_pass_a_loops_barrier_too() -> None:
    async def scene() -> None:
        barrier = AsyncRequestBarrier()
        inside, leave = threading.Event(), threading.Event()

        def ask() -> None:
            with barrier.request():
                inside.set()
                leave.wait(5)

        asking = asyncio.create_task(asyncio.to_thread(ask))
        await asyncio.to_thread(inside.wait, 5)
        with pytest.raises(ApplyError, match="1 requests"):
            await asyncio.to_thread(barrier.drain, 0.05)
        leave.set()
        await asking
        await asyncio.to_thread(barrier.drain, 5)

    asyncio.run(scene())
