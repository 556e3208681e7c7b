"""A network that fails at any request of a commit and a pull: nothing is lost, nothing wrong is accepted."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.hub_emulator.faults import Cut, Fault, LoseReply, Truncate
from tests.store.proxy import Proxy
from tests.store.racers import same_weights, write_checkpoint_folder
from weightline.chain.author import commit_folder
from weightline.chain.checkpoint import write_checkpoint
from weightline.chain.history import Chain
from weightline.chain.verify import verify_chain
from weightline.errors import DigestMismatchError, TransientStorageError
from weightline.store import Store, objects, open_store


@pytest.fixture(autouse=True)
def _no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEIGHTLINE_CACHE_NBYTES", "0")


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    return [write_checkpoint_folder(tmp_path / f"checkpoint-{seed}", seed) for seed in range(2)]


@pytest.fixture
def impatient(s3_url: str, s3_proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Store]:
    """Opens the bucket with a client that asks for everything once: each failure reaches the caller."""
    monkeypatch.setattr(objects, "_REPEATS", objects._ONCE)
    return lambda: open_store(s3_url).inner  # type: ignore[attr-defined]


def _commit_and_pull(store: Store, folder: Path, out: Path) -> None:
    chain = Chain(store)
    commit_folder(chain, folder, coding="gap")
    _pull_tip(chain, out)


def _pull_tip(chain: Chain, out: Path) -> None:
    write_checkpoint(chain, chain.tip().version, out)


@pytest.mark.slow
@pytest.mark.parametrize("fault", [Cut(), LoseReply()], ids=["cut", "lost reply"])
def test_the_network_goes_away_at_any_request(
    s3_url: str, s3_proxy: Proxy, impatient: Callable[[], Store], folders: list[Path], tmp_path: Path, fault: Fault
) -> None:
    """From request n on, all fail; then the user runs the same commands again."""
    commit_folder(Chain(open_store(s3_url)), folders[0])
    s3_proxy.reset()
    _commit_and_pull(impatient(), folders[1], tmp_path / "whole")
    num_requests = len(s3_proxy.requests)
    assert num_requests > 15
    for failing in range(num_requests):
        tip_before = Chain(open_store(s3_url)).tip().version
        s3_proxy.reset()
        s3_proxy.plan = lambda number, method, path, failing=failing: fault if number >= failing else None  # type: ignore[misc]
        folder, out = folders[failing % 2], tmp_path / f"out-{failing}"
        with pytest.raises(TransientStorageError):
            _commit_and_pull(impatient(), folder, out)
        s3_proxy.reset()
        chain = Chain(open_store(s3_url))
        assert chain.tip().version in (tip_before, tip_before + 1)
        _commit_and_pull(impatient(), folder, tmp_path / f"again-{failing}")
        assert same_weights(folder, tmp_path / f"again-{failing}")
        assert not (out / "weightline.json").exists()
    report = verify_chain(Chain(open_store(s3_url)))
    assert report.holds, report.findings


@pytest.mark.slow
def test_a_single_cut_at_any_request_is_not_noticed(
    s3_url: str, s3_proxy: Proxy, folders: list[Path], tmp_path: Path
) -> None:
    store = open_store(s3_url)
    commit_folder(Chain(store), folders[0])
    s3_proxy.reset()
    _commit_and_pull(store, folders[1], tmp_path / "whole")
    for failing in range(len(s3_proxy.requests)):
        s3_proxy.reset()
        s3_proxy.plan = lambda number, method, path, failing=failing: LoseReply() if number == failing else None  # type: ignore[misc]
        _commit_and_pull(store, folders[failing % 2], tmp_path / f"out-{failing}")
        s3_proxy.reset()
        assert same_weights(folders[failing % 2], tmp_path / f"out-{failing}")
    report = verify_chain(Chain(store))
    assert report.holds, report.findings
    assert report.num_versions == 2 + failing + 1


@pytest.mark.parametrize("kind", ["payloads", "assets"])
def test_a_flipped_bit_is_refused(s3_url: str, s3_proxy: Proxy, folders: list[Path], tmp_path: Path, kind: str) -> None:
    chain = Chain(open_store(s3_url))
    commit_folder(chain, folders[0])
    s3_proxy.flip = re.compile(f"/{kind}/")
    with pytest.raises(DigestMismatchError):
        write_checkpoint(chain, 0, tmp_path / "out")
    s3_proxy.reset()
    write_checkpoint(chain, 0, tmp_path / "again")
    assert same_weights(folders[0], tmp_path / "again")


def test_truncated_replies_are_refused(
    s3_proxy: Proxy, impatient: Callable[[], Store], folders: list[Path], tmp_path: Path
) -> None:
    store = impatient()
    commit_folder(Chain(store), folders[0])
    for what in ("list-type=2", "/commits/", "/payloads/", "/assets/"):
        s3_proxy.plan = lambda number, method, path, what=what: (  # type: ignore[misc]
            Truncate() if method == "GET" and what in path else None
        )
        with pytest.raises(TransientStorageError):
            _pull_tip(Chain(store), tmp_path / f"out-{what.strip('/')}")
    s3_proxy.reset()
    write_checkpoint(Chain(store), 0, tmp_path / "again")
    assert same_weights(folders[0], tmp_path / "again")
