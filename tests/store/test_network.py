"""A network that fails at requests of a commit and a pull: nothing is lost, nothing wrong is accepted."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.hub_emulator.faults import Cut, Fault, LoseReply, Truncate
from tests.store.proxy import Proxy
from tests.store.racers import same_weights, write_checkpoint_folder
from tests.store.servers import open_patiently
from weightline.chain.files.checkpoint import write_checkpoint
from weightline.chain.read.history import Chain
from weightline.chain.upkeep.verify import verify_chain
from weightline.chain.write.standalone import commit_folder
from weightline.errors import DigestMismatchError, TransientStorageError
from weightline.store import Store, open_store
from weightline.store.objects.store import Patience


@pytest.fixture(autouse=True)
def _no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEIGHTLINE_CACHE_NBYTES", "0")


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    return [write_checkpoint_folder(tmp_path / f"checkpoint-{seed}", seed) for seed in range(2)]


@pytest.fixture
def impatient(s3_proxy: Proxy) -> Callable[[str], Store]:
    """Opens the bucket with a client that asks for everything once: each failure reaches the caller."""
    return lambda url: open_patiently(url, Patience(num_retries=0))


def _commit_and_pull(store: Store, folder: Path, out: Path) -> None:
    chain = Chain(store)
    commit_folder(chain, folder, coding="gap")
    _pull_tip(chain, out)


def _pull_tip(chain: Chain, out: Path) -> None:
    write_checkpoint(chain, chain.tip().version, out)


@pytest.mark.parametrize("fault", [Cut(), LoseReply()], ids=["cut", "lost reply"])
def test_the_network_goes_away_at_a_request(
    s3_url: str, s3_proxy: Proxy, impatient: Callable[[str], Store], folders: list[Path], tmp_path: Path, fault: Fault
) -> None:
    """From request n on, all fail; then the user runs the same commands again."""
    num_requests = _count_requests(f"{s3_url}/whole", s3_proxy, folders, tmp_path / "whole")
    for failing in _some_of(num_requests):
        url, out = f"{s3_url}/{failing}", tmp_path / f"out-{failing}"
        commit_folder(Chain(open_store(url)), folders[0])
        s3_proxy.reset()
        s3_proxy.plan = lambda number, method, path, failing=failing: fault if number >= failing else None  # type: ignore[misc]
        with pytest.raises(TransientStorageError):
            _commit_and_pull(impatient(url), folders[1], out)
        s3_proxy.reset()
        chain = Chain(open_store(url))
        assert chain.tip().version in (0, 1)
        _commit_and_pull(impatient(url), folders[1], tmp_path / f"again-{failing}")
        assert same_weights(folders[1], tmp_path / f"again-{failing}")
        assert not (out / "weightline.json").exists()
        assert verify_chain(Chain(open_store(url))).holds


def test_a_single_cut_at_a_request_is_not_noticed(
    s3_url: str, s3_proxy: Proxy, folders: list[Path], tmp_path: Path
) -> None:
    num_requests = _count_requests(f"{s3_url}/whole", s3_proxy, folders, tmp_path / "whole")
    for failing in _some_of(num_requests):
        store, out = open_store(f"{s3_url}/{failing}"), tmp_path / f"out-{failing}"
        commit_folder(Chain(store), folders[0])
        s3_proxy.reset()
        s3_proxy.plan = lambda number, method, path, failing=failing: LoseReply() if number == failing else None  # type: ignore[misc]
        _commit_and_pull(store, folders[1], out)
        s3_proxy.reset()
        assert same_weights(folders[1], out)
        report = verify_chain(Chain(store))
        assert report.holds, report.findings
        assert report.num_versions == 2


def _some_of(num_requests: int) -> list[int]:
    """The first, the last and three between; tests/store/test_outages.py does every operation, in memory."""
    return [at * (num_requests - 1) // 4 for at in range(5)]


def _count_requests(url: str, proxy: Proxy, folders: list[Path], out: Path) -> int:
    """Requests of the second commit of a chain and a pull; the chain stays."""
    commit_folder(Chain(open_store(url)), folders[0])
    proxy.reset()
    _commit_and_pull(open_store(url), folders[1], out)
    assert len(proxy.requests) > 15
    return len(proxy.requests)


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
    s3_url: str, s3_proxy: Proxy, impatient: Callable[[str], Store], folders: list[Path], tmp_path: Path
) -> None:
    store = impatient(s3_url)
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
