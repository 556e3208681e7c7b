"""Chains that released versions wrote, frozen: every later release reads them to the bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.compat.generate import FOLDER, GENERATORS, sha256_of_state
from weightline.chain.read.history import Chain
from weightline.chain.read.records import EVALUATIONS, read_records
from weightline.chain.read.refs import current_refs, history_of, oldest_kept
from weightline.chain.replay.fetch import Fetcher
from weightline.chain.replay.plan import Ways
from weightline.chain.replay.state import HostState, advance_state, apply_hop, read_state
from weightline.chain.upkeep.verify import verify_chain
from weightline.store.local import LocalStore

FIXTURES = sorted(path for path in FOLDER.iterdir() if path.is_dir())


@pytest.fixture(params=FIXTURES, ids=lambda path: path.name)
def fixture(request: pytest.FixtureRequest) -> Path:
    return request.param


def opened(fixture: Path, tmp_path: Path) -> tuple[Chain, dict[str, Any]]:
    """A copy of the chain, and what to find in it: reading must not be able to touch the original."""
    copy = tmp_path / fixture.name
    shutil.copytree(fixture, copy)
    return Chain(LocalStore(copy)), json.loads((FOLDER / f"{fixture.name}.json").read_text())


def test_there_are_fixtures() -> None:
    assert FIXTURES
    for path in FIXTURES:
        assert sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) < 60_000


def test_verify_holds(fixture: Path, tmp_path: Path) -> None:
    chain, expected = opened(fixture, tmp_path)
    report = verify_chain(chain)
    assert report.findings == ()
    assert report.num_versions == len(expected["versions"])
    assert report.num_shortcuts > 0


def test_every_version_comes_back_to_the_bit(fixture: Path, tmp_path: Path) -> None:
    chain, expected = opened(fixture, tmp_path)
    for text, version in expected["versions"].items():
        manifest = chain.manifest(int(text))
        found = (manifest.commit_id, manifest.kind, manifest.coding, manifest.digests)
        assert found == (version["commit_id"], version["kind"], version["coding"], version["digests"])
        assert sha256_of_state(read_state(chain, manifest.version)) == version["sha256"]


def test_every_single_hop_comes_back_to_the_bit(fixture: Path, tmp_path: Path) -> None:
    """Deltas and shortcuts one by one: the cheapest way would not pass all of them."""
    chain, expected = opened(fixture, tmp_path)
    ways, fetcher = Ways(chain), Fetcher(chain.store, tmp_path)
    num_hops = 0
    for text, version in expected["versions"].items():
        for hop in ways(int(text)):
            if hop.version != int(text):
                continue
            state = HostState()
            if hop.start is not None:
                advance_state(chain, state, hop.start, fetcher=fetcher)
            apply_hop(chain, state, hop, fetcher)
            if hop.target == int(text):
                assert sha256_of_state(state) == version["sha256"]
                num_hops += 1
    assert num_hops > len(expected["versions"])


def test_records_refs_and_horizon(fixture: Path, tmp_path: Path) -> None:
    chain, expected = opened(fixture, tmp_path)
    assert {name: ref.version for name, ref in current_refs(chain).items()} == {"best": 3, "v1.0": 2}
    assert [ref.version for ref in history_of(chain, "best")] == [1, 3]
    assert [(r["version"], r["score"]) for r in read_records(chain, EVALUATIONS)] == [(3, 0.5)]
    assert oldest_kept(chain) == expected["oldest_kept"]


def test_its_generator_still_makes_the_fixture(fixture: Path, tmp_path: Path) -> None:
    """The same states, as versions of the same kinds and counts, in no more bytes (but for 2 %)."""
    written = GENERATORS[fixture.name](tmp_path / "chain")
    for before, now in zip(Chain(LocalStore(fixture)).manifests(), written.manifests(), strict=True):
        assert now.digests == before.digests
        for name in ("kind", "coding", "stage", "reverts_to", "num_changed", "num_elements", "world_size", "features"):
            assert getattr(now, name) == getattr(before, name)
        assert [ref.rank for ref in now.payloads] == [ref.rank for ref in before.payloads]
        assert now.payload_nbytes <= 1.02 * before.payload_nbytes


def test_what_the_first_release_would_not_know_is_announced() -> None:
    manifests = Chain(LocalStore(FOLDER / "chain-v1-mx")).manifests()
    assert [manifest.features for manifest in manifests] == [("asset-paths", "mx-dtypes")] * 6
    assert {asset.name for manifest in manifests for asset in manifest.assets} == {
        "config.json", "additional_chat_templates/tool_use.jinja",
    }  # fmt: skip


def test_a_damaged_fixture_is_noticed(fixture: Path, tmp_path: Path) -> None:
    chain, _ = opened(fixture, tmp_path)
    payload = next(Path(chain.url.removeprefix("file://")).glob("payloads/**/*.safetensors"))
    raw = bytearray(payload.read_bytes())
    raw[len(raw) // 2] ^= 1
    payload.write_bytes(raw)
    assert not verify_chain(chain).holds
