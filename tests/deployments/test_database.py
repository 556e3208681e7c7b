"""The PostgreSQL of a local stack: found or not, started, and ended with the process that started it."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import asyncpg
import psutil
import pytest

from tests.waiting import wait_until
from weightline.deployments.stack.database import Postgres, find_postgres
from weightline.errors import LaunchError

pytestmark = pytest.mark.process

_STARTER = """
import subprocess, sys, time
from pathlib import Path
from weightline.deployments.stack.database import find_postgres
postgres = find_postgres(Path(sys.argv[1]))
process = subprocess.Popen(postgres.argv)
postgres.wait_until_ready(lambda: process.poll() is not None)
print(process.pid, flush=True)
time.sleep(1000)
"""


def _postgres(folder: Path) -> Postgres:
    found = find_postgres(folder)
    assert isinstance(found, Postgres), found
    return found


@contextmanager
def _started(postgres: Postgres) -> Iterator[subprocess.Popen[bytes]]:
    postgres.initialize()
    with subprocess.Popen(postgres.argv) as process:
        try:
            postgres.wait_until_ready(lambda: process.poll() is not None)
            yield process
        finally:
            process.send_signal(signal.SIGINT)


def _execute(postgres: Postgres, statement: str) -> list[asyncpg.Record]:
    async def execute() -> list[asyncpg.Record]:
        connection = await asyncpg.connect(user="postgres", host=str(postgres.socket_dir))
        try:
            return await connection.fetch(statement)
        finally:
            await connection.close()

    return asyncio.run(execute())


@pytest.mark.parametrize("name", ["short", "long" * 30])
def test_what_is_written_is_there_after_a_restart(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    folder.mkdir()
    postgres = _postgres(folder)
    with _started(postgres):
        _execute(postgres, "CREATE TABLE kept (number int)")
        _execute(postgres, "INSERT INTO kept VALUES (7)")
        assert _execute(postgres, "SHOW listen_addresses")[0][0] == ""
        assert postgres.socket_dir.stat().st_mode & 0o077 == 0
    with _started(postgres):
        assert _execute(postgres, "SELECT number FROM kept")[0]["number"] == 7


def test_a_folder_that_an_interrupted_start_left_is_made_anew(tmp_path: Path) -> None:
    postgres = _postgres(tmp_path)
    postgres.data_dir.mkdir()
    (postgres.data_dir / "half").touch()
    with _started(postgres):
        assert _execute(postgres, "SELECT 1")[0][0] == 1


def test_it_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    _postgres(tmp_path).initialize()
    with subprocess.Popen([sys.executable, "-c", _STARTER, str(tmp_path)], stdout=subprocess.PIPE) as starter:
        assert starter.stdout is not None
        server = psutil.Process(int(starter.stdout.readline()))
        starter.kill()
    wait_until(lambda: not server.is_running() or server.status() == psutil.STATUS_ZOMBIE)


def test_why_there_is_none_is_said(tmp_path: Path) -> None:
    assert find_postgres(tmp_path, "no_such_package") == "the package no-such-package is not installed"
    assert "does not run here" in str(find_postgres(tmp_path, "json"))  # a package without PostgreSQL's programs
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(LaunchError, match="PostgreSQL cannot use"):
        _postgres(file / "below").initialize()
