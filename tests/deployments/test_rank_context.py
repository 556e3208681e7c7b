"""Publish steps under Prefect: recorded where a server is there, and never in the way where none is."""

from __future__ import annotations

import contextvars
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from prefect import flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.events import Event
from prefect.runtime import flow_run as current
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from tests import ROOT
from tests.waiting import PATIENCE_SECONDS, wait_until
from weightline.deployments.ranks.context import RANK_CONTEXT_VARIABLE, STEPS, rank_environment, write_rank_context
from weightline.deployments.ranks.outbox import EventOutbox
from weightline.deployments.server.events import event_id
from weightline.deployments.stack.stack import Stack, StackFolder, free_port
from weightline.errors import StorageError
from weightline.tasks.sync_steps import OnceOnly, RecordedSteps, describe, is_recorded, prefect_steps
from weightline.trainer.steps import Facts, PlainSteps, StepWork

#: Nothing listens on the discard port.
DEAD_API = "http://127.0.0.1:9/api"


def _run_rank(context_path: Path, api_url: str, *, rank: int = 0, world_size: int = 1) -> dict[str, Any]:
    env = rank_environment(context_path, api_url, {**os.environ, "PYTHONPATH": str(ROOT)}) | {"WEIGHTLINE_STEPS": STEPS}
    argv = [sys.executable, "-m", "tests.deployments.rank_program", "3", str(rank), str(world_size)]
    done = subprocess.run(
        argv, env=env, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told


def _assert_each_ran_once(told: dict[str, Any], num_names: int = 4) -> None:
    ran = {label: runs for label, runs in told.items() if label not in ("steps", "seconds")}
    assert len(ran) == 3 * num_names
    assert all(len(runs) == 1 for runs in ran.values())


@pytest.mark.slow
def test_steps_are_task_runs_of_the_stage_and_the_commit_is_an_event(
    client: SyncPrefectClient, tmp_path: Path, server: str
) -> None:
    @flow(name="toy-stage")
    def stage() -> str:
        write_rank_context(tmp_path / "flow_run.json")
        _assert_each_ran_once(_run_rank(tmp_path / "flow_run.json", server, world_size=2))
        _assert_each_ran_once(_run_rank(tmp_path / "flow_run.json", server, rank=1, world_size=2), num_names=3)
        return str(current.id)

    of_stage = FlowRunFilter(id=FlowRunFilterId(any_=[stage()]))
    runs = wait_until(lambda: client.read_task_runs(flow_run_filter=of_stage), lambda found: len(found) >= 21)

    expected = {f"commit v{version}" for version in range(3)}
    for name in ("gather partition", "compute delta", "upload payload"):
        expected |= {f"{name} v{version} r{rank}" for version in range(3) for rank in range(2)}
    assert {run.name for run in runs} == expected
    runs = wait_until(
        lambda: client.read_task_runs(flow_run_filter=of_stage),
        lambda found: all(run.state and run.state.is_completed() for run in found),
    )
    assert {run.state.message for run in runs if run.state} == {"5 changed (5.00 %)"}

    committed = wait_until(lambda: _events(client, "weightline.delta.committed"), lambda found: len(found) >= 3)
    assert {event["payload"]["version"] for event in committed} == {0, 1, 2}
    newest = next(event for event in committed if event["payload"]["version"] == 2)
    assert newest["resource"]["prefect.resource.id"] == "weightline.chain.toy.2"
    assert newest["payload"]["chain"] == "memory://toy"
    assert newest["id"] == str(event_id("memory://toy", f"{2:032x}"))


@pytest.mark.slow
def test_a_server_that_is_away_costs_a_step_nothing(server: str, tmp_path: Path) -> None:
    @flow(name="toy-stage")
    def stage() -> None:
        write_rank_context(tmp_path / "flow_run.json")

    stage()
    told = _run_rank(tmp_path / "flow_run.json", DEAD_API)
    assert told["steps"] == "RecordedSteps"
    _assert_each_ran_once(told)
    assert max(told["seconds"]) < 2.0


def test_without_a_server_or_a_flow_run_the_steps_are_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(RANK_CONTEXT_VARIABLE, raising=False)
    assert isinstance(prefect_steps(), PlainSteps)
    assert rank_environment(Path("x"), None, {"A": "1"}) == {"A": "1"}


def test_a_step_runs_once_when_prefect_breaks_before_it() -> None:
    ran: list[int] = []
    steps = RecordedSteps(_BrokenContext(RuntimeError("prefect broke")), max_recorded_ranks=8)  # type: ignore[arg-type]
    assert steps.upload_payload(_work(lambda: _note(ran))) == {"ran": 1}
    assert ran == [1]


def test_a_step_runs_once_when_prefect_breaks_after_it() -> None:
    ran: list[int] = []
    context = _BrokenContext(RuntimeError("prefect broke"), runs_first=True)
    steps = RecordedSteps(context, max_recorded_ranks=8)  # type: ignore[arg-type]
    assert steps.upload_payload(_work(lambda: _note(ran))) == {"ran": 1}
    assert ran == [1]


def test_the_steps_own_error_is_the_one_that_is_raised() -> None:
    def fail() -> Facts:
        raise StorageError("the bucket is full", url="memory://x")

    context = _BrokenContext(RuntimeError("prefect broke"), runs_first=True)
    steps = RecordedSteps(context, max_recorded_ranks=8)  # type: ignore[arg-type]
    with pytest.raises(StorageError, match="the bucket is full"):
        steps.upload_payload(_work(fail))


def test_a_step_refuses_to_run_twice() -> None:
    step = OnceOnly(lambda: {"ran": 1})
    assert step() == {"ran": 1}
    with pytest.raises(RuntimeError, match="twice"):
        step()
    assert step.outcome() == {"ran": 1}


def test_every_rank_of_a_small_job_is_recorded_and_rank_0_of_a_large_one() -> None:
    assert [rank for rank in range(8) if is_recorded(rank, 8, 8)] == list(range(8))
    assert [rank for rank in range(9) if is_recorded(rank, 9, 8)] == [0]


def test_a_rank_that_is_not_recorded_runs_plainly() -> None:
    ran: list[int] = []
    steps = RecordedSteps(_BrokenContext(AssertionError("must not be asked")), max_recorded_ranks=1)  # type: ignore[arg-type]
    assert steps.compute_delta(_work(lambda: _note(ran), rank=1)) == {"ran": 1}


def test_what_a_step_did_is_told_in_words() -> None:
    facts = {"num_changed": 62_113, "num_elements": 400_000, "payload_nbytes": 51_234}
    assert describe(facts) == "62,113 changed (15.53 %), 51.2 kB"
    assert describe({"key": "payloads/x"}) == "done"


def test_events_wait_for_a_server_that_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weightline.deployments.ranks.outbox._RETRY_SECONDS", 0.1)
    received: list[dict[str, Any]] = []
    placeholder = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    port = placeholder.server_address[1]
    placeholder.server_close()
    outbox = EventOutbox(f"http://127.0.0.1:{port}/api")
    for number in range(3):
        outbox.put(("event", _event(number)))
    time.sleep(0.3)
    assert outbox.num_waiting == 3

    with ThreadingHTTPServer(("127.0.0.1", port), _receiver(received)) as returned:
        threading.Thread(target=returned.serve_forever, daemon=True).start()
        wait_until(lambda: received, lambda found: len(found) >= 3)
        returned.shutdown()
    assert [event["payload"]["number"] for event in received] == [0, 1, 2]
    outbox.close()
    assert outbox.num_waiting == 0


def test_a_refusal_that_may_pass_keeps_the_events_and_is_told_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("weightline.deployments.ranks.outbox._RETRY_SECONDS", 0.05)
    received: list[dict[str, Any]] = []
    answers = [401, 403, 408, 429, 404, 500, 204, 422, 204]
    with ThreadingHTTPServer(("127.0.0.1", 0), _receiver(received, answers)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}):
            outbox = EventOutbox(f"http://127.0.0.1:{server.server_address[1]}/api")
            outbox.put(("event", _event(0)))
            wait_until(lambda: outbox.num_waiting, lambda num_waiting: num_waiting == 0)
            assert len(answers) == 2
            for number in (1, 2):
                outbox.put(("event", _event(number)))
                wait_until(lambda: outbox.num_waiting, lambda num_waiting: num_waiting == 0)
        outbox.close()
        server.shutdown()
    assert [event["payload"]["number"] for event in received] == [0] * 7 + [1, 2]
    (warning,) = [record.message for record in caplog.records if record.name == "weightline.deployments.ranks.outbox"]
    assert "(HTTP 401)" in warning
    assert "PREFECT_API_AUTH_STRING" in warning


@pytest.mark.slow
def test_events_reach_a_server_that_has_a_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weightline.deployments.ranks.outbox._RETRY_SECONDS", 0.1)
    monkeypatch.setenv("PREFECT_SERVER_API_AUTH_STRING", "weightline:secret")
    stack = Stack(StackFolder.under(tmp_path), free_port(0))
    try:
        stack.start_server()
        wrong = EventOutbox(stack.api_url)
        wrong.put(("event", _event(0)))
        with temporary_settings({PREFECT_API_URL: stack.api_url, PREFECT_API_AUTH_STRING: "weightline:secret"}):
            outbox = EventOutbox(stack.api_url)
            outbox.put(("event", _event(1)))
            wait_until(lambda: outbox.num_waiting, lambda num_waiting: num_waiting == 0)
            with get_client(sync_client=True) as client:
                found = wait_until(lambda: _read_events(client, "toy"), bool)
        assert [event["payload"]["number"] for event in found] == [1]
        assert wrong.num_waiting == 1
        for one in (outbox, wrong):
            one.close()
    finally:
        stack.end()


def test_closing_the_outbox_never_waits_long_for_a_server_that_hangs() -> None:
    hangs = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)  # accepts, and never answers
    outbox = EventOutbox(f"http://127.0.0.1:{hangs.server_address[1]}/api")
    outbox.put(("event", _event(0)))
    started = time.monotonic()
    outbox.close()
    assert time.monotonic() - started < 30
    hangs.server_close()


class _BrokenContext:
    """A context whose `run` breaks before or after the task function ran."""

    def __init__(self, error: Exception, *, runs_first: bool = False) -> None:
        self._error, self._runs_first = error, runs_first

    def run(self, task: Any, *, step: OnceOnly, **_: Any) -> None:
        if self._runs_first:
            contextvars.copy_context().run(step)
        raise self._error


def _work(run: Callable[[], Facts], rank: int = 0) -> StepWork:
    return StepWork("upload_payload", 3, rank, 2, "sft", "memory://toy", run)


def _note(ran: list[int]) -> Facts:
    ran.append(1)
    return {"ran": len(ran)}


def _event(number: int) -> Event:
    return Event(event="toy", resource={"prefect.resource.id": f"toy.{number}"}, payload={"number": number})


def _receiver(received: list[dict[str, Any]], answers: list[int] | None = None) -> type[BaseHTTPRequestHandler]:
    """A server of events that gives these answers, first to last, then 204. It has no tokens against forgery."""

    class Receiver(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(404)

        def do_POST(self) -> None:
            received.extend(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(answers.pop(0) if answers else 204)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            return

    return Receiver


def _events(client: SyncPrefectClient, name: str) -> list[dict[str, Any]]:
    return [event for event in _read_events(client, name) if event["payload"]["chain"] == "memory://toy"]


def _read_events(client: SyncPrefectClient, name: str) -> list[dict[str, Any]]:
    found = client.request("POST", "/events/filter", json={"filter": {"event": {"name": [name]}}})
    events: list[dict[str, Any]] = found.json()["events"]
    return events
