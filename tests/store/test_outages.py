"""A network that fails at any operation of a commit and a pull, in memory; test_network does a few over HTTP."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.store.racers import same_weights, write_checkpoint_folder
from weightline.chain.files.checkpoint import write_checkpoint
from weightline.chain.read.history import Chain
from weightline.chain.upkeep.verify import verify_chain
from weightline.chain.write.standalone import commit_folder
from weightline.errors import TransientStorageError
from weightline.store import ObjectInfo, Store
from weightline.store.memory import MemoryStore
from weightline.store.retry import RetryingStore
from weightline.testing.faults import FaultStore


class CutStore(FaultStore):
    """When `plan` raises for an operation, it does not take place. A listing fails when it is read, as remote ones."""

    def list(self, prefix: str, start_after: str = "") -> Iterator[ObjectInfo]:
        self._next("list", prefix)
        yield from self.inner.list(prefix, start_after)


class LosingStore(CutStore):
    """Writes take effect; when `plan` raises for one, its caller does not learn it. A read that fails read nothing."""

    def put_if_absent(self, key: str, body: bytes) -> None:
        self.inner.put_if_absent(key, body)
        self._next("put_if_absent", key)

    def put(self, key: str, body: bytes) -> None:
        self.inner.put(key, body)
        self._next("put", key)

    def put_file(self, key: str, path: Path) -> None:
        self.inner.put_file(key, path)
        self._next("put_file", key)

    def delete(self, *keys: str) -> None:
        for key in keys:
            self.inner.delete(key)
            self._next("delete", key)


def _failing_when(is_away: Callable[[int], bool]) -> Callable[[int, str, str], None]:
    def plan(number: int, verb: str, key: str) -> None:
        if is_away(number):
            raise TransientStorageError(f"{verb} of {key} failed, as planned", key=key)

    return plan


def _never(_: int) -> bool:
    return False


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return [write_checkpoint_folder(root / str(seed), seed) for seed in range(2)]


def _commit_and_pull(store: Store, folder: Path, out: Path) -> None:
    chain = Chain(store)
    commit_folder(chain, folder, coding="gap")
    write_checkpoint(chain, chain.tip().version, out)


def _with_first_version(folders: list[Path]) -> MemoryStore:
    inner = MemoryStore()
    commit_folder(Chain(inner), folders[0])
    return inner


def _num_operations(kind: type[FaultStore], folders: list[Path], out: Path) -> int:
    store = kind(_with_first_version(folders), _failing_when(_never))
    _commit_and_pull(store, folders[1], out)
    assert store.num_operations > 15
    return store.num_operations


@pytest.mark.parametrize("kind", [CutStore, LosingStore], ids=["cut", "lost reply"])
def test_the_network_goes_away_at_any_operation(kind: type[FaultStore], folders: list[Path], tmp_path: Path) -> None:
    """From operation n on, all fail; then the user runs the same commands again."""
    for failing in range(_num_operations(kind, folders, tmp_path / "whole")):
        inner, out, again = _with_first_version(folders), tmp_path / f"out-{failing}", tmp_path / f"again-{failing}"
        with pytest.raises(TransientStorageError):
            _commit_and_pull(kind(inner, _failing_when(lambda n, at=failing: n >= at)), folders[1], out)  # type: ignore[misc]
        assert Chain(inner).tip().version in (0, 1)
        _commit_and_pull(inner, folders[1], again)
        assert same_weights(folders[1], again)
        assert not (out / "weightline.json").exists()
        assert verify_chain(Chain(inner)).holds


@pytest.mark.parametrize("kind", [CutStore, LosingStore], ids=["cut", "lost reply"])
def test_a_single_failure_at_any_operation_is_not_noticed(
    kind: type[FaultStore], folders: list[Path], tmp_path: Path
) -> None:
    for failing in range(_num_operations(kind, folders, tmp_path / "whole")):
        inner, out = _with_first_version(folders), tmp_path / f"out-{failing}"
        faulty = kind(inner, _failing_when(lambda n, at=failing: n == at))  # type: ignore[misc]
        _commit_and_pull(RetryingStore(faulty, pause_seconds=0.001), folders[1], out)
        assert same_weights(folders[1], out)
        report = verify_chain(Chain(inner))
        assert report.holds, report.findings
        assert report.num_versions == 2
