"""Publish steps under Prefect: recorded where a server is there, undisturbed whatever Prefect or its server does."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from prefect import flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas import FlowRun
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.events import Event
from prefect.runtime import flow_run as current
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from tests import ROOT
from tests.waiting import PATIENCE_SECONDS, wait_until
from weightline.deployments.ranks.context import (
    OBSERVER,
    RANK_CONTEXT_VARIABLE,
    rank_context,
    rank_environment,
    write_rank_context,
)
from weightline.deployments.ranks.outbox import EventOutbox
from weightline.deployments.ranks.recorder import MAX_WAITING, StepRecorder, is_recorded
from weightline.deployments.server.events import event_id
from weightline.deployments.stack.database import CONNECTION_VARIABLE
from weightline.deployments.stack.folder import StackFolder, StackRecord
from weightline.deployments.stack.stack import Stack, free_port
from weightline.errors import StorageError
from weightline.tasks.sync_steps import describe, prefect_observer
from weightline.trainer.steps import OBSERVER_VARIABLE, NoObserver, Step, StepFacts, StepObserver

#: Nothing listens on the discard port.
DEAD_API = "http://127.0.0.1:9/api"


def _run_rank(context_path: Path, api_url: str, *, rank: int = 0, world_size: int = 1) -> dict[str, list[float]]:
    """The seconds that each step of the rank took. The rank prints nothing to its error stream."""
    env = rank_environment(context_path, api_url, {**os.environ, "PYTHONPATH": str(ROOT), OBSERVER_VARIABLE: OBSERVER})
    argv = [sys.executable, "-m", "tests.deployments.rank_program", "3", str(rank), str(world_size)]
    done = subprocess.run(
        argv, env=env, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    printed = json.loads(done.stdout.splitlines()[-1])
    assert printed["observer"] == "StepRecorder"
    seconds: dict[str, list[float]] = printed["seconds"]
    return seconds


def _assert_each_ran_once(seconds: dict[str, list[float]], num_names: int = 4) -> None:
    assert len(seconds) == 3 * num_names
    assert all(len(runs) == 1 for runs in seconds.values())


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
    messages = {run.name: run.state.message for run in runs if run.state}
    assert {message for name, message in messages.items() if "commit" not in name} == {"5 changed (5.00 %)"}
    assert {message for name, message in messages.items() if "commit" in name} == {"5 changed (5.00 %), 600 B"}
    assert all(run.start_time and run.end_time and run.end_time >= run.start_time for run in runs)

    committed = wait_until(lambda: _events(client, "weightline.delta.committed"), lambda found: len(found) >= 3)
    assert {event["payload"]["version"] for event in committed} == {0, 1, 2}
    newest = next(event for event in committed if event["payload"]["version"] == 2)
    assert newest["resource"]["prefect.resource.id"] == "weightline.chain.toy.2"
    assert newest["payload"]["chain"] == "memory://toy"
    assert newest["id"] == str(event_id("memory://toy", f"{2:032x}"))


@pytest.fixture(params=["away", "hung"])
def lost_server(request: pytest.FixtureRequest) -> Iterator[str]:
    """The URL of a server that is not there, or of one that accepts connections and never answers."""
    if request.param == "away":
        yield DEAD_API
        return
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/api"


@pytest.mark.flows
def test_a_server_that_is_lost_costs_a_step_nothing(lost_server: str, tmp_path: Path) -> None:
    seconds = _run_rank(_flow_run_file(tmp_path), lost_server)
    _assert_each_ran_once(seconds)
    # Prefect's own client would take 83 s (away) and 115 s (hung) for these steps.
    assert sum(took for runs in seconds.values() for took in runs) < 30


@pytest.mark.process
def test_every_event_is_sent_though_the_server_answers_no_question(tmp_path: Path) -> None:
    """Prefect would ask for the flow's name before each event, unless it is in a cache of its own."""
    received: list[dict[str, Any]] = []
    with ThreadingHTTPServer(("127.0.0.1", 0), _receiver(received)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        _run_rank(_flow_run_file(tmp_path), f"http://127.0.0.1:{server.server_address[1]}/api")
        server.shutdown()
    names = [event["resource"]["prefect.resource.name"] for event in received if event["event"].endswith("Completed")]
    assert len(names) == 12
    assert len([event for event in received if event["event"] == "weightline.delta.committed"]) == 3


def test_without_a_server_or_a_flow_run_nothing_is_observed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(RANK_CONTEXT_VARIABLE, raising=False)
    assert isinstance(prefect_observer(), NoObserver)
    assert rank_environment(Path("x"), None, {"A": "1"}) == {"A": "1"}


def _break_at_once(step: Step) -> None:
    raise RuntimeError("prefect broke")


def _break_afterwards(step: Step) -> None:
    step.wait()
    raise RuntimeError("prefect broke")


@pytest.mark.parametrize("record", [_break_at_once, _break_afterwards])
def test_a_step_is_done_and_the_next_one_recorded_when_prefect_breaks(
    record: Callable[[Step], None], caplog: pytest.LogCaptureFixture
) -> None:
    recorder = StepRecorder(nullcontext, record, max_recorded_ranks=8)
    for _ in range(2):
        assert _run_step(recorder) == StepFacts(payload_nbytes=1)
    recorder.close()
    assert [record.message for record in caplog.records if "broke" in record.message] == [
        "Prefect did not record upload_payload v3: RuntimeError('prefect broke')"
    ] * 2


def test_steps_go_on_when_the_flow_run_cannot_be_entered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(RANK_CONTEXT_VARIABLE, str(tmp_path / "nothing.json"))
    recorder = StepRecorder(rank_context, Step.wait, max_recorded_ranks=8)
    assert _run_step(recorder) == StepFacts(payload_nbytes=1)
    recorder.close()
    (warning,) = [record.message for record in caplog.records if record.name == "weightline.deployments.ranks.recorder"]
    assert "nothing.json" in warning


def test_steps_go_on_and_training_ends_when_prefect_stands_still(caplog: pytest.LogCaptureFixture) -> None:
    released = threading.Event()
    recorder = StepRecorder(nullcontext, lambda _: released.wait(), max_recorded_ranks=8, close_seconds=0.1)
    for _ in range(MAX_WAITING + 2):
        assert _run_step(recorder) == StepFacts(payload_nbytes=1)
    assert any("takes no more steps" in record.message for record in caplog.records)
    recorder.close()
    assert not released.is_set()
    released.set()


def test_the_steps_own_error_is_raised_and_not_blamed_on_prefect(caplog: pytest.LogCaptureFixture) -> None:
    recorder = StepRecorder(nullcontext, _break_afterwards, max_recorded_ranks=8)
    with pytest.raises(StorageError, match="the bucket is full"), _step(recorder) as step:
        raise StorageError("the bucket is full", url="memory://x")
    recorder.close()
    assert step.has_failed
    with pytest.raises(StorageError, match="the bucket is full"):
        step.wait()
    assert not caplog.records


def test_every_rank_of_a_small_job_is_recorded_and_rank_0_of_a_large_one() -> None:
    assert [rank for rank in range(8) if is_recorded(rank, 8, 8)] == list(range(8))
    assert [rank for rank in range(9) if is_recorded(rank, 9, 8)] == [0]


def test_a_rank_that_is_not_recorded_is_not_observed() -> None:
    seen: list[Step] = []
    recorder = StepRecorder(nullcontext, seen.append, max_recorded_ranks=1)
    assert _run_step(recorder, rank=1) == StepFacts(payload_nbytes=1)
    _run_step(recorder, rank=0)
    recorder.close()
    assert [step.rank for step in seen] == [0]


def test_what_a_step_did_is_put_in_words() -> None:
    facts = StepFacts(num_changed=62_113, num_elements=400_000, payload_nbytes=51_234)
    assert describe(facts) == "62,113 changed (15.53 %), 51.2 kB"
    assert describe(StepFacts()) == "done"


def test_events_wait_for_a_server_that_comes_back() -> None:
    received: list[dict[str, Any]] = []
    placeholder = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    port = placeholder.server_address[1]
    placeholder.server_close()
    outbox = EventOutbox(f"http://127.0.0.1:{port}/api", retry_seconds=0.1)
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


def test_a_refusal_that_may_pass_keeps_the_events_and_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    received: list[dict[str, Any]] = []
    answers = [401, 403, 408, 429, 404, 500, 204, 422, 204]
    with ThreadingHTTPServer(("127.0.0.1", 0), _receiver(received, answers)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}):
            outbox = EventOutbox(f"http://127.0.0.1:{server.server_address[1]}/api", retry_seconds=0.05)
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


@pytest.mark.nightly
@pytest.mark.flows
def test_events_reach_a_server_that_has_a_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its database is the one that the environment names, so the stack starts none."""
    monkeypatch.setenv("PREFECT_SERVER_API_AUTH_STRING", "weightline:secret")
    monkeypatch.setenv(CONNECTION_VARIABLE, f"sqlite+aiosqlite:///{tmp_path}/own.db")
    folder = StackFolder.under(tmp_path)
    stack = Stack(folder, free_port(0))
    try:
        stack.start_server()
        record = StackRecord.load(folder.record_path)
        assert record is not None
        assert set(record.processes) == {"server"}
        assert (tmp_path / "own.db").exists()
        wrong = EventOutbox(stack.api_url, retry_seconds=0.1)
        wrong.put(("event", _event(0)))
        with temporary_settings({PREFECT_API_URL: stack.api_url, PREFECT_API_AUTH_STRING: "weightline:secret"}):
            outbox = EventOutbox(stack.api_url, retry_seconds=0.1)
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


def _step(observer: StepObserver, rank: int = 0) -> Step:
    return Step("upload_payload", 3, rank, 2, "memory://toy", observer)


def _run_step(observer: StepObserver, rank: int = 0) -> StepFacts:
    with _step(observer, rank) as step:
        step.report(StepFacts(payload_nbytes=1))
    return step.wait()


def _flow_run_file(folder: Path) -> Path:
    """What `write_rank_context` writes in a flow run."""
    path = folder / "flow_run.json"
    flow_run = FlowRun(flow_id=uuid4(), name="toy")
    path.write_text(json.dumps({"flow_run": flow_run.model_dump(mode="json"), "flow_name": "toy-stage"}))
    return path


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
