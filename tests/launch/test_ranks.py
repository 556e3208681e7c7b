"""Ranks are streamed, explained when they fail, and never outlive whoever started them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests import ROOT
from tests.waiting import wait_until
from weightline.errors import LaunchError
from weightline.launch.command import launch_argv
from weightline.launch.ranks import run_ranks, with_rank_logs

ENV = {**os.environ, "PYTHONPATH": str(ROOT)}


def _argv(how: str, folder: Path) -> list[str]:
    return [sys.executable, "-m", "tests.launch.fake_launcher", how, str(folder / "pids")]


def _rank_pids(folder: Path) -> list[int]:
    """Once all are written down."""
    with contextlib.suppress(FileNotFoundError):
        pids = [int(text) for text in (folder / "pids").read_text().split()]
        if len(pids) == 2:
            return pids
    return []


def _assert_gone(pids: list[int]) -> None:
    assert len(pids) == 2
    wait_until(lambda: not any(_is_running(pid) for pid in pids))


def _is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _run(how: str, folder: Path, tick: Callable[[], None] = lambda: None) -> list[str]:
    shown: list[str] = []
    run_ranks(_argv(how, folder), ENV, folder / "ranks.log", shown.append, tick)
    return shown


@pytest.mark.process
def test_lines_are_shown_with_their_ranks_and_kept_in_a_file(tmp_path: Path) -> None:
    ticks: list[int] = []
    shown = _run("succeed", tmp_path, lambda: ticks.append(1))
    assert [line for line in shown if "[rank 0]" in line] == [f"[rank 0] zero at {step}" for step in range(3)]
    assert [line for line in shown if "[rank 1]" in line] == [f"[rank 1] one at {step}" for step in range(3)]
    assert (tmp_path / "ranks.log").read_text().count("at 2") == 2
    assert ticks
    _assert_gone(_rank_pids(tmp_path))


@pytest.mark.process
def test_a_failure_tells_the_last_lines_of_the_rank_that_failed_first(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match="rank 1 ended with exit code 3") as caught:
        _run("rank-fails", tmp_path)
    assert caught.value.tail == ["one at 0", "one at 1", "one at 2", "ValueError: the data are gone"]
    assert "connection reset" not in str(caught.value)
    assert str(tmp_path / "ranks.log") in str(caught.value)


@pytest.mark.process
def test_an_exception_in_the_middle_ends_ranks_in_sessions_of_their_own(tmp_path: Path) -> None:
    def interrupt() -> None:
        if _rank_pids(tmp_path):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _run("hang", tmp_path, interrupt)
    _assert_gone(_rank_pids(tmp_path))


@pytest.mark.process
def test_ranks_whose_launcher_was_killed_are_ended(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match="launcher ended with exit code -9"):
        _run("die", tmp_path)
    _assert_gone(_rank_pids(tmp_path))


@pytest.mark.process
def test_a_launcher_goes_when_its_flow_is_killed(tmp_path: Path) -> None:
    program = (
        "import os, sys; from pathlib import Path; from weightline.launch.ranks import run_ranks; "
        "folder = Path(sys.argv[1]); argv = sys.argv[2:]; "
        "run_ranks(argv, os.environ, folder / 'ranks.log', print, lambda: None)"
    )
    argv = [sys.executable, "-c", program, str(tmp_path), *_argv("hang", tmp_path)]
    flow = subprocess.Popen(argv, env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    pids = wait_until(lambda: _rank_pids(tmp_path))
    launcher = psutil.Process(pids[0]).parent()
    assert launcher is not None
    os.kill(flow.pid, signal.SIGKILL)
    flow.wait()
    wait_until(lambda: not _is_running(launcher.pid))
    for pid in pids:  # torchrun ends its ranks when it is told to end; this stand-in does not
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def test_the_launch_command_labels_lines_and_keeps_a_log_a_rank() -> None:
    argv = with_rank_logs(launch_argv("job.json", 2), Path("/logs"))
    start = argv.index("accelerate.commands.launch") + 1
    assert argv[start : start + 4] == ["--tee", "3", "--log_dir", "/logs"]
    assert argv[-2:] == ["--job", "job.json"]
