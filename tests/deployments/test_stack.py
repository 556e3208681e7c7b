"""A local stack: what its processes share, that it comes up, stays up, and goes without a trace."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
from prefect.settings import Settings

from tests.waiting import PATIENCE_SECONDS, wait_until
from weightline.deployments.stack import Engine
from weightline.deployments.stack.folder import (
    StackFolder,
    StackRecord,
    is_healthy,
    running_stack,
    stack_environment,
)
from weightline.deployments.stack.stack import free_port
from weightline.fleet.local_replica import REPLICA_PYTHON_VARIABLE
from weightline.launch.processes import ProcessTree, marked_environment

StartFlows = Callable[..., subprocess.Popen[str]]


def test_nothing_of_a_stack_leaves_the_machine(tmp_path: Path) -> None:
    env = stack_environment(StackFolder(tmp_path), 4321, {"PATH": "/bin", "NO_PROXY": "example.com"})
    assert env["PREFECT_API_URL"] == "http://127.0.0.1:4321/api"
    assert env["PREFECT_SERVER_ANALYTICS_ENABLED"] == "false"
    assert env["DO_NOT_TRACK"] == "1"
    assert env["PREFECT_HOME"].startswith(str(tmp_path))
    assert env["NO_PROXY"] == env["no_proxy"] == "example.com,127.0.0.1,localhost"
    assert env["PATH"] == "/bin"
    assert env[REPLICA_PYTHON_VARIABLE] == ""


def test_the_processes_of_a_stack_know_what_serves(tmp_path: Path) -> None:
    outer = stack_environment(StackFolder(tmp_path), 4321, {}, Path("/vllm/bin/python"))
    assert outer[REPLICA_PYTHON_VARIABLE] == "/vllm/bin/python"
    assert stack_environment(StackFolder(tmp_path), 4321, outer)[REPLICA_PYTHON_VARIABLE] == ""
    assert StackRecord("", "", vllm_python="/vllm/bin/python").engine is Engine.VLLM
    assert StackRecord("", "").engine is Engine.EMBEDDED


def test_prefect_understands_every_setting_of_a_stack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in stack_environment(StackFolder(tmp_path), 4321, {}).items():
        monkeypatch.setenv(name, value)
    settings = Settings()
    assert settings.api.url == "http://127.0.0.1:4321/api"
    assert settings.server.services.late_runs.enabled is False
    assert settings.server.services.task_run_recorder.batch_size == 50
    assert settings.server.services.scheduler.min_scheduled_time == timedelta(minutes=5)
    assert settings.client.max_retries == 6
    assert settings.server.analytics_enabled is False


def test_a_taken_port_is_passed_over() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert free_port(port) != port
    assert free_port(port) == port


def test_no_stack_is_running_where_none_was_started(tmp_path: Path) -> None:
    assert running_stack(StackFolder(tmp_path)) is None
    assert not is_healthy("http://127.0.0.1:9/api")


@pytest.fixture
def flows(tmp_path: Path) -> Iterator[StartFlows]:
    """Starts `weightline`, and ends all of it, whatever fails."""
    env, mark = marked_environment(os.environ)
    with ExitStack() as at_end:

        def start(*argv: str) -> subprocess.Popen[str]:
            process = at_end.enter_context(subprocess.Popen(
                [sys.executable, "-m", "weightline", *argv, "--runs-dir", str(tmp_path / "runs")], env=env,
                cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=_heed_interrupts,
            ))  # fmt: skip
            at_end.callback(ProcessTree(process.pid, mark).end)
            return process

        yield start


def _heed_interrupts() -> None:
    """A shell's background job, as a CI's may be, has SIGINT ignored, and its children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.flows
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_run_that_is_interrupted_leaves_no_process(tmp_path: Path, flows: StartFlows, how: signal.Signals) -> None:
    run = flows("run", "--port", "0")
    folder = StackFolder.under(tmp_path / "runs")
    last_started = "worker" if how is signal.SIGINT else "server"
    record = wait_until(
        lambda: StackRecord.load(folder.record_path),
        lambda found: run.poll() is not None or (found is not None and last_started in found.processes),
    )
    assert run.poll() is None, run.communicate()
    assert record is not None
    members = [child for p in record.processes.values() for child in psutil.Process(p.pid).children(recursive=True)]
    os.kill(run.pid, how)
    _, err = run.communicate(timeout=PATIENCE_SECONDS)
    assert run.returncode == (130 if how is signal.SIGINT else -how)
    if how is signal.SIGINT:
        assert err.strip().splitlines()[-1] == "interrupted: all processes were ended"
    wait_until(
        lambda: not any(p.is_alive() for p in record.processes.values()) and not any(m.is_running() for m in members)
    )


@pytest.mark.process
def test_a_wrong_recipe_is_one_clear_error_before_anything_is_started(tmp_path: Path, flows: StartFlows) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("name: toy\nmodel: {tiny: {}}\nstages: [{kind: sft, max_step: 3, learning_rate: 1.0e-3}]\n")
    run = flows("run", "--recipe", str(recipe))
    out, err = run.communicate(timeout=PATIENCE_SECONDS)
    assert run.returncode == 1
    assert out == ""
    assert err.startswith("error (recipe): stages[0].max_step")
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.process
@pytest.mark.parametrize(
    ("argv", "environment", "returncode", "told"),
    [
        (["up", "--port", "99999"], {}, 2, "Invalid value for '--port'"),
        (["run", "one.yaml", "--recipe", "two.yaml"], {}, 2, "name the recipe once"),
        (["run", "no-such-recipe"], {}, 1, "error (recipe): recipe: no-such-recipe cannot be read"),
        (["up", "--port", "-1"], {}, 2, "Invalid value for '--port'"),
        (["up", "--engine", "sglang"], {}, 2, "Invalid value for '--engine'"),
        (["up", "--engine", "vllm"], {"WEIGHTLINE_VLLM_PYTHON": "/no/python"}, 1, "engine: /no/python is no Python"),
        (["up", "--engine", "vllm"], {"WEIGHTLINE_VLLM_PYTHON": "/bin/false"}, 1, "engine: /bin/false is no Python"),
        (["up", "--runs-dir", "{file}"], {}, 2, "Invalid value for '--runs-dir'"),
        (["up", "--runs-dir", "{file}/below"], {}, 1, "error (os): [Errno 20] Not a directory"),
        (
            ["deploy"],
            {"PREFECT_API_URL": "http://127.0.0.1:9/api"},
            1,
            "error (input): PREFECT_API_URL: no Prefect",
        ),
        (["deploy"], {"PREFECT_API_URL": "not-a-url"}, 1, "error (input): PREFECT_API_URL: no Prefect"),
        (["deploy"], {"PREFECT_API_URL": "http://[::1"}, 1, "error (input): PREFECT_API_URL: no Prefect"),
    ],
)
def test_wrong_usage_is_one_clear_error(
    tmp_path: Path, argv: list[str], environment: dict[str, str], returncode: int, told: str
) -> None:
    file = tmp_path / "file"
    file.touch()
    done = subprocess.run(
        [sys.executable, "-m", "weightline", *(part.format(file=file) for part in argv)],
        env=os.environ | environment, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE_SECONDS,
    )  # fmt: skip
    assert done.returncode == returncode, done.stderr
    assert told in done.stderr
    assert "Traceback" not in done.stderr
