"""A soak of one chain: processes that commit, revert, compact, expire, collect, tag and read, under kill -9.

    python -m tests.chain.soak FOLDER SECONDS

Every writer notes the sha256 of a state in a journal before it commits it. At the end every kept version must be, bit
for bit, what the journal says, and the chain must verify, before and after a last collection. The last line of the
output is a JSON object with what was seen. The processes are forked from one that has compiled the kernels.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path

import numpy as np

from tests.chains import AT_ONCE, State, commit_state
from weightline.chain.files.checkpoint import write_checkpoint
from weightline.chain.files.source import FolderSource
from weightline.chain.read.history import Chain
from weightline.chain.read.refs import current_refs, move_ref, oldest_kept
from weightline.chain.replay.state import read_state
from weightline.chain.upkeep.compact import AnchorPolicy, plan_compaction, write_compaction
from weightline.chain.upkeep.gc import collect, plan_gc, view_chain
from weightline.chain.upkeep.retention import expire_before
from weightline.chain.upkeep.verify import verify_chain
from weightline.chain.write.standalone import commit_revert
from weightline.errors import ConflictError, InputError, NotFoundError, WeightlineError
from weightline.store.local import LocalStore

_SHAPES = {f"layers.{number}.weight": (2000,) for number in range(6)}
#: Longer than a commit or a read takes here; a process that is killed leaves what gc takes after it.
_GRACE = timedelta(seconds=60)
_ANCHORS = AnchorPolicy(delta_elements_per_second=1e-9)


class Soak:
    """One folder: the chain, the journal of states, and the errors that no process should have met."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._journal, self._errors = folder / "journal", folder / "errors"

    def chain(self) -> Chain:
        return Chain(LocalStore(self.folder / "chain"))

    def note(self, sha256: str) -> None:
        _append(self._journal, sha256)

    def journal(self) -> set[str]:
        return set(_lines(self._journal))

    def err(self, role: str, error: BaseException) -> None:
        _append(self._errors, f"{role}: {type(error).__name__}: {error}".replace("\n", " "))

    def errors(self) -> list[str]:
        return _lines(self._errors)

    def write(self) -> None:
        chain = self.chain()
        tip = chain.tip_version()
        rng = np.random.default_rng(int.from_bytes(os.urandom(8), "little"))
        if tip is None:
            old, new = None, {name: _bits(rng, shape) for name, shape in _SHAPES.items()}
        else:
            old = read_state(chain, tip).bits
            new = {name: np.where(rng.random(b.shape) < 0.02, _bits(rng, b.shape), b) for name, b in old.items()}
        self.note(_sha256(new))
        commit_state(_Pinned(chain.store, tip), new, old)

    def revert(self) -> None:
        chain = self.chain()
        tip = chain.tip_version() or 0
        if tip > 5:
            commit_revert(chain, random.randint(max(oldest_kept(chain), tip - 8), tip - 1))
        time.sleep(0.5)

    def compact(self) -> None:
        chain = self.chain()
        if (chain.tip_version() or 0) > 3:
            write_compaction(chain, plan_compaction(chain, coding="gap", policy=_ANCHORS), coding="gap")
        time.sleep(0.2)

    def expire(self) -> None:
        chain = self.chain()
        tip = chain.tip_version() or 0
        if tip > 20:
            expire_before(chain, tip - random.randint(8, 15))
        time.sleep(0.5)

    def collect(self) -> None:
        chain = self.chain()
        collect(chain, plan_gc(view_chain(chain), grace=_GRACE))
        time.sleep(0.1)

    def tag(self) -> None:
        chain = self.chain()
        tip = chain.tip_version() or 0
        if tip > 4:
            move_ref(chain, f"ref-{random.randint(0, 5)}", tip - random.randint(0, 3))
        time.sleep(0.5)

    def read(self) -> None:
        chain = self.chain()
        tip = chain.tip_version()
        if tip is None:
            time.sleep(0.1)
            return
        version = random.randint(min(oldest_kept(chain), tip), tip)
        if _sha256(read_state(chain, version).bits) not in self.journal():
            raise AssertionError(f"version {version} holds a state that no writer committed")


class _Pinned(Chain):
    """A chain whose tip is what its writer has read: another writer's commit in between is a conflict."""

    def __init__(self, store: LocalStore, tip: int | None) -> None:
        super().__init__(store)
        self._tip = tip

    def tip_version(self) -> int | None:
        return self._tip


ROLES: tuple[Callable[[Soak], None], ...] = (
    Soak.write, Soak.write, Soak.revert, Soak.compact, Soak.expire, Soak.collect, Soak.tag, Soak.read,
)  # fmt: skip


def _repeat(soak: Soak, role: Callable[[Soak], None]) -> None:
    """One process's life. It may lose a race, and what it reads may expire and be collected under it."""
    random.seed(os.urandom(8))
    while True:
        horizon = oldest_kept(soak.chain())
        try:
            role(soak)
        except (ConflictError, InputError):
            continue
        except NotFoundError as error:
            if oldest_kept(soak.chain()) == horizon:
                soak.err(role.__name__, error)
        except (WeightlineError, AssertionError, OSError) as error:
            soak.err(role.__name__, error)


def _start(soak: Soak, role: Callable[[Soak], None]) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            _repeat(soak, role)
        finally:
            os._exit(1)
    return pid


def _warm_up() -> None:
    """Compiles every kernel once, before the processes are forked."""
    with tempfile.TemporaryDirectory() as folder:
        soak = Soak(Path(folder))
        for _ in range(7):
            soak.write()
        for role in (Soak.revert, Soak.compact, Soak.read):
            role(soak)


def run(folder: Path, seconds: float) -> dict[str, object]:
    """Lets all processes loose, kills one at random every few seconds, and judges what is left."""
    _warm_up()
    soak = Soak(folder)
    living = {number: _start(soak, role) for number, role in enumerate(ROLES)}
    num_kills, end = 0, time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        time.sleep(min(left, random.uniform(1.0, 4.0)))
        number = random.randrange(len(ROLES))
        os.kill(living[number], signal.SIGKILL)
        num_kills += 1
        for one, pid in living.items():
            if one == number or os.waitpid(pid, os.WNOHANG)[0]:
                if one == number:
                    os.waitpid(pid, 0)
                living[one] = _start(soak, ROLES[one])
    for pid in living.values():
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return _judge(soak) | {"num_kills": num_kills}


def _judge(soak: Soak) -> dict[str, object]:
    chain, journal = soak.chain(), soak.journal()
    findings = [f"{f.rule}: {f.subject}: {f.message}" for f in verify_chain(chain).findings]
    kept = sorted({*chain.versions(oldest_kept(chain)), *(ref.version for ref in current_refs(chain).values())})
    foreign = [version for version in kept if _pulled_sha256(soak, version) not in journal]
    collect(chain, plan_gc(view_chain(chain), grace=AT_ONCE))
    findings += [f"after gc: {f.rule}: {f.subject}: {f.message}" for f in verify_chain(soak.chain()).findings]
    foreign += [version for version in kept if _pulled_sha256(soak, version) not in journal]
    return {
        "tip": chain.tip_version(), "horizon": oldest_kept(chain), "kept": kept, "foreign": foreign,
        "findings": findings, "errors": soak.errors(),
    }  # fmt: skip


def _pulled_sha256(soak: Soak, version: int) -> str:
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(soak.chain(), version, Path(folder) / "pulled")
        source = FolderSource(Path(folder) / "pulled")
        return _sha256(source.read(source.specs))


def _bits(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.integers(0, 1 << 16, shape, dtype=np.uint16)


def _sha256(state: State | Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(state[name]).tobytes())
    return digest.hexdigest()


def _append(path: Path, line: str) -> None:
    """One write of one line: whole, or not there, whenever the process is killed."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(descriptor, f"{line}\n".encode())
    finally:
        os.close(descriptor)


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


if __name__ == "__main__":
    print(json.dumps(run(Path(sys.argv[1]), float(sys.argv[2]))))
