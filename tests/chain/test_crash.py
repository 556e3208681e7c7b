"""A crash at every single store operation: the chain opens, verifies and goes on."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.chains import AT_ONCE, commit_state, nudged, random_state
from weightline.chain.files.assets import assets_of
from weightline.chain.read.history import Chain
from weightline.chain.read.refs import move_ref
from weightline.chain.replay.state import read_state
from weightline.chain.upkeep.compact import AnchorPolicy, plan_compaction, write_compaction
from weightline.chain.upkeep.gc import collect, plan_gc, view_chain
from weightline.chain.upkeep.retention import expire_before
from weightline.chain.upkeep.verify import verify_chain
from weightline.chain.write import version as version_module
from weightline.chain.write.standalone import commit_folder, commit_fork, commit_revert
from weightline.chain.write.version import mark_upgraded
from weightline.errors import CommitConflictError, TransientStorageError
from weightline.format.manifest import FORMAT_1, FORMAT_2
from weightline.store.memory import MemoryStore
from weightline.testing.faults import FaultStore

_STATES = [random_state(0, {"weight": (6, 4), "scale": ()})]
for _seed in range(1, 4):
    _STATES.append(nudged(_STATES[-1], _seed))
_EXPECTED = [*_STATES, _STATES[1]]


class CrashError(Exception):
    """The process is gone."""


def _commit(version: int) -> Callable[[Chain], None]:
    def step(chain: Chain) -> None:
        tip = chain.tip_version()
        if tip is None or tip < version:
            commit_state(chain, _STATES[version], _STATES[version - 1] if version else None, world_size=1)

    return step


def _revert(chain: Chain) -> None:
    if chain.tip_version() == 3:
        commit_revert(chain, 1)


def _compact(chain: Chain) -> None:
    policy = AnchorPolicy(delta_elements_per_second=1e-9)
    write_compaction(chain, plan_compaction(chain, coding="gap", policy=policy), coding="gap")


def _collect(chain: Chain) -> None:
    collect(chain, plan_gc(view_chain(chain), grace=AT_ONCE))


#: Each step may be repeated from its start after a crash in it.
STEPS: list[Callable[[Chain], object]] = [
    *(_commit(version) for version in range(4)),
    lambda chain: move_ref(chain, "serving", 2),
    mark_upgraded,
    _revert,
    _compact,
    lambda chain: expire_before(chain, 3),
    _collect,
]


def _run(store: FaultStore, steps: Sequence[Callable[[Chain], object]] = STEPS) -> int:
    """Run the steps until one crashes; how many went through."""
    for number, step in enumerate(steps):
        try:
            step(Chain(store))
        except CrashError:
            return number
    return len(steps)


def _check_goes_on(inner: MemoryStore, num_done: int) -> None:
    assert verify_chain(Chain(inner)).holds
    for step in STEPS[num_done:]:
        step(Chain(inner))
    report = verify_chain(Chain(inner))
    assert report.holds, report.findings
    chain = Chain(inner)
    assert chain.tip_version() == 4
    for version in (2, 3, 4):
        state = read_state(chain, version)
        assert all(np.array_equal(state.bits[n], b.reshape(-1)) for n, b in _EXPECTED[version].items())


@pytest.fixture(params=[FORMAT_1, FORMAT_2])
def written_as(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Chains begin in this format."""
    monkeypatch.setattr(version_module, "NEW_CHAINS", request.param)
    return str(request.param)


@pytest.mark.parametrize("every", [4, pytest.param(1, marks=pytest.mark.nightly)])
@pytest.mark.usefixtures("written_as")
def test_a_crash_before_any_store_operation_leaves_a_chain_that_goes_on(every: int) -> None:
    """By day at every fourth operation: the test after it leaves the chain in each of the same states."""
    whole = FaultStore(MemoryStore(), lambda *_: None)
    assert _run(whole) == len(STEPS)
    assert whole.num_operations > 80
    for crash_at in range(0, whole.num_operations, every):
        inner = MemoryStore()
        _check_goes_on(inner, _run(FaultStore(inner, _crash_at(crash_at))))


@pytest.mark.usefixtures("written_as")
def test_a_crash_after_any_write_leaves_a_chain_that_goes_on() -> None:
    whole = _CrashAfterWrite(MemoryStore(), -1)
    assert _run(whole) == len(STEPS)
    assert whole.num_writes > 20
    for crash_after in range(1, whole.num_writes + 1):
        inner = MemoryStore()
        _check_goes_on(inner, _run(_CrashAfterWrite(inner, crash_after)))


def _crash_at(number: int) -> Callable[[int, str, str], None]:
    def plan(this_number: int, verb: str, key: str) -> None:
        if this_number == number:
            raise CrashError

    return plan


class _CrashAfterWrite(FaultStore):
    """Dies right after its n-th write took effect, before anybody hears of it."""

    def __init__(self, inner: MemoryStore, crash_after: int) -> None:
        super().__init__(inner, lambda *_: None)
        self._crash_after = crash_after
        self.num_writes = 0

    def put_if_absent(self, key: str, body: bytes) -> None:
        super().put_if_absent(key, body)
        self._written()

    def put(self, key: str, body: bytes) -> None:
        super().put(key, body)
        self._written()

    def put_file(self, key: str, path: Path) -> None:
        super().put_file(key, path)
        self._written()

    def delete(self, *keys: str) -> None:
        for key in keys:
            super().delete(key)
            self._written()

    def _written(self) -> None:
        self.num_writes += 1
        if self.num_writes == self._crash_after:
            raise CrashError


def _folder_steps(root: Path) -> list[Callable[[Chain], object]]:
    """Two checkpoint folders, committed one after the other."""

    def step(number: int) -> Callable[[Chain], object]:
        folder = root / str(number)
        folder.mkdir()
        save_file({name: np.array(bits) for name, bits in _STATES[number].items()}, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({"number": number}))
        return lambda chain: commit_folder(chain, folder) if chain.tip_version() in (None, number - 1) else None

    return [step(0), step(1)]


def _fork_steps(root: Path) -> list[Callable[[Chain], object]]:
    """A fork of the second folder's version."""
    source = Chain(MemoryStore("memory://source"))
    for step in _folder_steps(root):
        step(source)
    return [lambda chain: commit_fork(source, 1, chain) if chain.tip_version() is None else None]


@pytest.mark.parametrize("steps_of", [_folder_steps, _fork_steps])
def test_a_crash_while_a_folder_or_a_fork_is_committed(
    tmp_path: Path, steps_of: Callable[[Path], list[Callable[[Chain], object]]]
) -> None:
    steps = steps_of(tmp_path)
    before, after = FaultStore(MemoryStore(), lambda *_: None), _CrashAfterWrite(MemoryStore(), -1)
    assert _run(before, steps) == _run(after, steps) == len(steps)
    assert before.num_operations > after.num_writes >= 5 * len(steps)
    crashes = [lambda inner, at=at: FaultStore(inner, _crash_at(at)) for at in range(before.num_operations)]
    crashes += [lambda inner, at=at: _CrashAfterWrite(inner, at) for at in range(1, after.num_writes + 1)]
    for crash in crashes:
        inner = MemoryStore()
        num_done = _run(crash(inner), steps)
        assert verify_chain(Chain(inner)).holds
        for step in steps[num_done:]:
            step(Chain(inner))
        chain = Chain(inner)
        _collect(chain)
        report = verify_chain(chain)
        assert report.holds, report.findings
        assert chain.tip_version() == len(steps) - 1
        state = read_state(chain, len(steps) - 1)
        assert all(np.array_equal(state.bits[name], bits.reshape(-1)) for name, bits in _STATES[1].items())
        [asset] = assets_of(chain, len(steps) - 1)
        assert json.loads(inner.get(asset.key)) == {"number": 1}


def test_a_conflict_loses_nothing_of_either_writer() -> None:
    store = MemoryStore()
    commit_state(Chain(store), _STATES[0])

    class Slow(FaultStore):
        """Another writer commits between our check and our put."""

        def put_if_absent(self, key: str, body: bytes) -> None:
            if key.startswith("commits/") and Chain(store).tip_version() == 0:
                commit_state(Chain(store), _STATES[2], _STATES[0])
            super().put_if_absent(key, body)

    ours = Chain(Slow(store, lambda *_: None))
    with pytest.raises(CommitConflictError):
        commit_state(ours, _STATES[1], _STATES[0])
    assert verify_chain(Chain(store)).holds
    assert np.array_equal(read_state(Chain(store), 1).bits["weight"], _STATES[2]["weight"].reshape(-1))
    orphans = plan_gc(view_chain(Chain(store)), grace=timedelta(hours=1)).payloads
    assert orphans == ()


def test_a_transient_failure_is_typed() -> None:
    def plan(number: int, verb: str, key: str) -> None:
        raise TransientStorageError("away", key=key)

    with pytest.raises(TransientStorageError):
        Chain(FaultStore(MemoryStore(), plan)).tip_version()
