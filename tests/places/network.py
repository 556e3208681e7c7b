"""Places: network namespaces that only reach the neighbors to which a link leads, with files of their own.

A place stands for a machine elsewhere. Its processes see no network but its links, no files of the other places, and
no shared memory of theirs. What all of them read is the code of this repository and the interpreter.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests import ROOT

#: What a process of a place inherits of this one. Everything else could be a way from one place to another.
_INHERITED = ("PATH", "LANG", "LC_ALL", "VIRTUAL_ENV")


#: Before the id of the process that made a namespace, which keeps those of two runs on one machine apart.
_PREFIX = "weightline-places-"


class NoNamespacesError(Exception):
    """This machine makes no network namespaces."""


@dataclass(frozen=True, slots=True)
class Place:
    """One namespace."""

    name: str
    namespace: str
    folder: Path
    hidden: tuple[Path, ...]
    """Folders of the other places: empty for its processes."""
    address: str
    """Where its neighbors reach it."""

    def start(
        self, argv: Sequence[str], log_path: Path, environment: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Starts a process in this place. It is the leader of a group, and its output goes to a log."""
        with log_path.open("ab") as log:
            return subprocess.Popen(
                self._entered(argv), env=self._environment(environment), cwd=self.folder, stdin=subprocess.DEVNULL,
                stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def ask(self, argv: Sequence[str], environment: Mapping[str, str] | None = None) -> str:
        """Runs a process of this place to its end and returns what it prints. The test fails when it fails."""
        done = subprocess.run(
            self._entered(argv), env=self._environment(environment), cwd=self.folder, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{argv}\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
        return done.stdout

    def _entered(self, argv: Sequence[str]) -> list[str]:
        hide = "".join(f"mount -t tmpfs none {folder} && " for folder in self.hidden)
        shell = ["unshare", "--mount", "--ipc", "sh", "-c", f'{hide}mount -t tmpfs none /dev/shm && exec "$@"', "sh"]
        # The kernel ends the process when this one ends, in whatever way.
        return ["setpriv", "--pdeathsig", "KILL", "ip", "netns", "exec", self.namespace, *shell, *argv]

    def _environment(self, given: Mapping[str, str] | None) -> dict[str, str]:
        inherited = {name: os.environ[name] for name in _INHERITED if name in os.environ}
        own = {"HOME": str(self.folder), "TMPDIR": str(self.folder), "PYTHONPATH": str(ROOT), "DO_NOT_TRACK": "1"}
        return inherited | own | dict(given or {})


@contextmanager
def places(base: Path, names: Sequence[str], links: Sequence[tuple[str, str]]) -> Iterator[dict[str, Place]]:
    """The places for the length of a block, each linked with the neighbors that `links` names and with no other.

    NoNamespacesError when this machine makes none.
    """
    _remove_those_of_ended_runs()
    folders = {name: base / name for name in names}
    for folder in folders.values():
        folder.mkdir(parents=True)
    namespaces = {name: f"{_PREFIX}{os.getpid()}-{name}" for name in names}
    addresses = {name: f"10.210.100.{number}" for number, name in enumerate(names, start=1)}
    with ExitStack() as held:
        for name, namespace in namespaces.items():
            _ip("netns", "add", namespace)
            held.callback(_ip, "netns", "delete", namespace)
            _ip("-n", namespace, "link", "set", "lo", "up")
            _ip("-n", namespace, "address", "add", f"{addresses[name]}/32", "dev", "lo")
        for number, (one, other) in enumerate(links):
            ends = {one: (f"wl{number}a", f"10.210.{number}.1"), other: (f"wl{number}b", f"10.210.{number}.2")}
            peer = ("type", "veth", "peer", "name", ends[other][0], "netns", namespaces[other])
            _ip("link", "add", ends[one][0], "netns", namespaces[one], *peer)
            for name, (device, address) in ends.items():
                _ip("-n", namespaces[name], "address", "add", f"{address}/30", "dev", device)
                _ip("-n", namespaces[name], "link", "set", device, "up")
            for name, neighbor in ((one, other), (other, one)):
                way = ("via", ends[neighbor][1], "src", addresses[name])
                _ip("-n", namespaces[name], "route", "add", f"{addresses[neighbor]}/32", *way)
        yield {
            name: Place(
                name,
                namespaces[name],
                folders[name],
                tuple(folder for other, folder in folders.items() if other != name),
                addresses[name],
            )
            for name in names
        }


def _remove_those_of_ended_runs() -> None:
    """Deletes the namespaces that a killed run has left."""
    for line in _ip("netns", "list").splitlines():
        namespace = line.split()[0]
        number = namespace.removeprefix(_PREFIX).partition("-")[0]
        if namespace.startswith(_PREFIX) and number.isdecimal() and not Path("/proc", number).exists():
            _ip("netns", "delete", namespace)


def _ip(*arguments: str) -> str:
    try:
        return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout
    except FileNotFoundError as error:
        raise NoNamespacesError("the program `ip` is not installed (package iproute2)") from error
    except subprocess.CalledProcessError as error:
        raise NoNamespacesError(f"ip {' '.join(arguments)}: {error.stderr.strip()}") from error
