"""The gate of an asyncio server, closed from a thread."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from weightline.errors import ApplyError
from weightline.serving.engines.vllm.gate import LoopGate


def test_a_refresh_waits_for_those_inside_and_holds_the_others_back() -> None:
    async def scene() -> list[str]:
        gate, events = LoopGate(), []

        async def request(name: str, seconds: float, *, holds_up: bool = True) -> None:
            async with gate.passing(holds_up=holds_up):
                events.append(f"{name} in")
                await asyncio.sleep(seconds)
                events.append(f"{name} out")

        def refresh() -> None:
            gate.close(5)
            events.append("closed")
            time.sleep(0.1)
            events.append("open")
            gate.open()

        first = asyncio.create_task(request("first", 0.1))
        mixing = asyncio.create_task(request("mixing", 0.4, holds_up=False))
        await asyncio.sleep(0.02)
        refreshing = asyncio.create_task(asyncio.to_thread(refresh))
        await asyncio.sleep(0.02)
        late = asyncio.create_task(request("late", 0))
        await asyncio.gather(first, mixing, refreshing, late)
        return events

    events = asyncio.run(scene())
    assert events == ["first in", "mixing in", "first out", "closed", "open", "late in", "late out", "mixing out"]


def test_a_request_that_is_cancelled_or_fails_leaves() -> None:
    async def scene() -> None:
        gate = LoopGate()

        async def request() -> None:
            async with gate.passing():
                await asyncio.sleep(60)

        task = asyncio.create_task(request())
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.to_thread(gate.close, 1)

    asyncio.run(scene())


def test_a_drain_that_takes_too_long_opens_again() -> None:
    async def scene() -> None:
        gate = LoopGate()
        async with gate.passing():
            with pytest.raises(ApplyError, match=r"1 requests were still running after 0\.05 s"):
                await asyncio.to_thread(gate.close, 0.05)
        async with gate.passing():
            pass

    asyncio.run(scene())


def test_threads_pass_too() -> None:
    async def scene() -> None:
        gate = LoopGate()
        inside, leave = threading.Event(), threading.Event()

        def ask() -> None:
            with gate.request():
                inside.set()
                leave.wait(5)

        asking = asyncio.create_task(asyncio.to_thread(ask))
        await asyncio.to_thread(inside.wait, 5)
        with pytest.raises(ApplyError, match="1 requests"):
            await asyncio.to_thread(gate.close, 0.05)
        leave.set()
        await asking
        await asyncio.to_thread(gate.close, 5)

    asyncio.run(scene())
