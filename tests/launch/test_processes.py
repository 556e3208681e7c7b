"""Process trees and the registry of a stack: what was started is ended, and nothing else."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from weightline.deployments.stack.registry import StackFacts, StackProcess, read_facts, write_facts
from weightline.launch.processes import ProcessTree, start_process

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
def test_a_registered_process_is_ended_by_its_pid_and_start() -> None:
    process = start_process(["sleep", "300"])
    registered = StackProcess.of("sleeper", process.pid)
    assert registered.is_alive()
    registered.end()
    process.wait()
    assert not registered.is_alive()


@pytest.mark.process
def test_a_foreign_process_with_the_same_pid_is_left_alone() -> None:
    process = start_process(["sleep", "300"])
    foreign = StackProcess("sleeper", process.pid, StackProcess.of("sleeper", process.pid).created_at - 10)
    assert not foreign.is_alive()
    foreign.end()
    assert process.poll() is None
    process.kill()
    process.wait()


def test_facts_survive_the_file_and_a_broken_file_is_none(tmp_path: Path) -> None:
    path = tmp_path / "processes.json"
    assert read_facts(path) is None
    facts = StackFacts("http://127.0.0.1:1/api", "http://127.0.0.1:1", (StackProcess("server", 1, 2.5),))
    write_facts(path, facts)
    assert read_facts(path) == facts
    path.write_text('{"api_url": 3')
    assert read_facts(path) is None
    path.write_text('{"api_url": 3}')
    assert read_facts(path) is None


def test_a_stack_of_the_dead_is_not_up() -> None:
    dead = StackProcess("server", 2**22 - 1, 1.0)
    assert not StackFacts("", "", (dead,)).is_up
    assert not StackFacts("", "", ()).is_up
