"""Process trees and the record of a stack: what was started is ended, and nothing else."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from weightline.deployments.stack.folder import StackRecord
from weightline.launch.processes import ProcessId, ProcessTree, start_process

_PARENT = """
import subprocess, sys, time
child = subprocess.Popen(["sleep", "300"], start_new_session=True)
print(child.pid, flush=True)
time.sleep(float(sys.argv[1]))
"""


def _start_parent(life_seconds: float) -> tuple[subprocess.Popen[bytes], psutil.Process]:
    parent = start_process([sys.executable, "-c", _PARENT, str(life_seconds)], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    parent.stdout.close()
    return parent, child


def _is_gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


@pytest.mark.process
def test_a_tree_ends_with_all_that_it_started() -> None:
    parent, child = _start_parent(300)
    tree = ProcessTree(parent.pid)
    assert {process.pid for process in tree.alive()} == {parent.pid, child.pid}
    tree.end()
    parent.wait()
    assert _is_gone(child)
    assert tree.alive() == []
    tree.end()


@pytest.mark.process
def test_a_child_whose_parent_has_gone_still_belongs_to_the_tree() -> None:
    parent, child = _start_parent(0.5)
    tree = ProcessTree(parent.pid)
    parent.wait()
    assert not _is_gone(child)
    tree.end()
    assert _is_gone(child)


@pytest.mark.process
def test_a_process_that_ignores_being_asked_is_made_to_go() -> None:
    stubborn = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(300)"
    )
    process = start_process([sys.executable, "-c", stubborn], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    started = time.monotonic()
    ProcessTree(process.pid).end(grace_seconds=0.5)
    process.wait()
    assert time.monotonic() - started < 60


@pytest.mark.process
def test_a_recorded_process_is_ended_by_its_pid_and_start() -> None:
    process = start_process(["sleep", "300"])
    recorded = ProcessId.of(process.pid)
    assert recorded.is_alive()
    recorded.end()
    process.wait()
    assert not recorded.is_alive()


@pytest.mark.process
def test_a_foreign_process_with_the_same_pid_is_left_alone() -> None:
    process = start_process(["sleep", "300"])
    foreign = ProcessId(process.pid, ProcessId.of(process.pid).created_at - 10)
    assert not foreign.is_alive()
    foreign.end()
    assert process.poll() is None
    process.kill()
    process.wait()


def test_a_record_survives_its_file_and_a_broken_file_holds_none(tmp_path: Path) -> None:
    path = tmp_path / "processes.json"
    assert StackRecord.load(path) is None
    record = StackRecord("http://127.0.0.1:1/api", "http://127.0.0.1:1", None, {"server": ProcessId(1, 2.5)})
    record.save(path)
    assert StackRecord.load(path) == record
    path.write_text('{"api_url": 3')
    assert StackRecord.load(path) is None
    path.write_text('{"api_url": 3}')
    assert StackRecord.load(path) is None


def test_a_stack_whose_processes_have_ended_is_not_whole() -> None:
    dead = ProcessId(2**22 - 1, 1.0)
    assert not StackRecord("", "", processes={"server": dead}).is_whole
    assert not StackRecord("", "").is_whole
