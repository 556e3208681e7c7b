"""The folders that SGLang's /pull_weights reads, read back by the rules of that layout."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
import uuid
import zlib
from pathlib import Path

import numpy as np
import pytest
import zstandard
from safetensors import safe_open

from tests.chains import commit_state, nudged, random_state
from tests.waiting import wait_until
from weightline.chain import Chain, open_chain
from weightline.chain.files.checkpoint import write_checkpoint
from weightline.chain.files.source import FolderSource
from weightline.chain.read.leases import live_leases
from weightline.errors import InputError, NotFoundError, VersionNotFoundError
from weightline.format import keys
from weightline.format.manifest import AssetRef
from weightline.serving.engines.sglang import INDEX, Publisher, publish_up_to, publish_version, version_folder
from weightline.serving.replica.following import Following


@pytest.fixture
def chain() -> Chain:
    """Three versions; the last one changes nothing."""
    made = open_chain(f"memory://{uuid.uuid4().hex}/toy")
    states = [random_state(0)]
    states.append(nudged(states[0], 1))
    commit_state(made, states[0])
    commit_state(made, states[1], states[0])
    commit_state(made, states[1], states[1])
    return made


def pull(source_dir: Path, local: Path, applied: int, target: int) -> int:
    """What a reader of the layout does: from the newest full version on, if that is newer than the local one, patch a
    plain checkpoint in place, one version after the other, checked. Returns where it began."""
    start = target
    while start > applied and (version_folder(source_dir, start) / INDEX).exists():
        start -= 1
    if start > applied:
        shutil.rmtree(local)
        shutil.copytree(version_folder(source_dir, start), local)
    for version in range(start + 1, target + 1):
        folder = version_folder(source_dir, version)
        metadata = json.loads((folder / INDEX).read_text())["metadata"]
        assert (int(metadata["version"]), int(metadata["base_version"])) == (version, version - 1)
        assert metadata["delta_encoding"] == "xor"
        assert metadata["compression_format"] == "zstd"
        assert metadata["checksum_format"] == "adler32"
        for path in sorted(folder.glob("*.safetensors")):
            _patch(local, path)
    return start


def _patch(local: Path, path: Path) -> None:
    entries = FolderSource(local)._entries
    with safe_open(path, "np") as file:
        checksums = file.metadata()
        for name in file.keys():  # noqa: SIM118 - not a mapping
            entry = entries[name]
            difference = zstandard.ZstdDecompressor().decompress(file.get_tensor(name).tobytes())
            region = np.memmap(entry.path, np.uint8, "r+", entry.offset, entry.spec.nbytes)
            region ^= np.frombuffer(difference, np.uint8)
            assert f"{zlib.adler32(region.tobytes()):08x}" == checksums[name]


def _assert_same_weights(folder: Path, chain: Chain, version: int, tmp_path: Path) -> None:
    write_checkpoint(chain, version, tmp_path / f"expected-{version}")
    held, expected = FolderSource(folder), FolderSource(tmp_path / f"expected-{version}")
    assert held.specs == expected.specs
    for name, bits_N in expected.read(expected.specs).items():
        np.testing.assert_array_equal(held.read([name])[name], bits_N, strict=True)


def test_pulled_versions_are_the_chains_bit_for_bit(chain: Chain, tmp_path: Path) -> None:
    source, local = tmp_path / "source", tmp_path / "local"
    assert list(publish_up_to(chain, 2, source)) == [version_folder(source, version) for version in range(3)]
    shutil.copytree(version_folder(source, 0), local)
    pull(source, local, 0, 1)
    _assert_same_weights(local, chain, 1, tmp_path)
    pull(source, local, 1, 2)
    _assert_same_weights(local, chain, 2, tmp_path)


def test_a_full_version_is_a_plain_checkpoint(chain: Chain, tmp_path: Path) -> None:
    folder = publish_version(chain, 1, tmp_path / "source", is_full=True)
    assert not (folder / INDEX).exists()
    _assert_same_weights(folder, chain, 1, tmp_path)


def test_publishing_again_changes_nothing_and_goes_on_where_it_ended(chain: Chain, tmp_path: Path) -> None:
    source = tmp_path / "source"
    list(publish_up_to(chain, 1, source))
    before = {path: path.stat().st_mtime_ns for path in source.rglob("*")}
    assert list(publish_up_to(chain, 1, source)) == []
    assert {path: path.stat().st_mtime_ns for path in source.rglob("*")} == before
    assert list(publish_up_to(chain, 2, source)) == [version_folder(source, 2)]
    assert json.loads((version_folder(source, 2) / INDEX).read_text())["weight_map"] == {}


def test_nothing_is_left_of_a_version_that_cannot_be_published(chain: Chain, tmp_path: Path) -> None:
    source = tmp_path / "source"
    with pytest.raises(VersionNotFoundError):
        publish_version(chain, 9, source)
    assert not source.exists()
    with pytest.raises(VersionNotFoundError):
        list(publish_up_to(chain, 9, source))


def test_after_a_gap_in_the_chain_the_next_version_is_whole(chain: Chain, tmp_path: Path) -> None:
    source, local = tmp_path / "source", tmp_path / "local"
    publish_version(chain, 0, source)
    shutil.copytree(version_folder(source, 0), local)
    state = random_state(7)
    commit_state(chain, state)
    commit_state(chain, nudged(state, 8), state)
    for version in (1, 2):
        chain.store.delete(keys.commit(version))
    assert list(publish_up_to(chain, 4, source)) == [version_folder(source, version) for version in (3, 4)]
    assert pull(source, local, 0, 4) == 3
    _assert_same_weights(local, chain, 4, tmp_path)


def test_a_version_that_no_patch_can_make_is_published_in_full(chain: Chain, tmp_path: Path) -> None:
    source, local = tmp_path / "source", tmp_path / "local"
    grown = random_state(1, {"model.embed.weight": (40, 8), "extra.weight": (3, 3)})
    moved = nudged(grown, 2)
    sha256 = hashlib.sha256(b"{}").hexdigest()
    asset = AssetRef(key=keys.asset(sha256), nbytes=2, sha256=sha256, name="tokenizer.json")
    chain.store.put(asset.key, b"{}")
    commit_state(chain, grown)
    commit_state(chain, moved, grown)
    commit_state(chain, moved, moved, assets=(asset,))
    commit_state(chain, grown, moved)
    list(publish_up_to(chain, 6, source))
    full = [version for version in range(7) if not (version_folder(source, version) / INDEX).exists()]
    assert full == [0, 3, 5], "the first, one with another tensor, one with another tokenizer"
    shutil.copytree(version_folder(source, 0), local)
    for applied, version in ((0, 2), (2, 4), (4, 6)):
        pull(source, local, applied, version)
        _assert_same_weights(local, chain, version, tmp_path)
    assert (local / "tokenizer.json").read_bytes() == b"{}"


class _Stop(BaseException):
    """Ends a publisher, which outlives every Exception."""


def test_a_publisher_outlives_a_fault_and_its_lease_says_what_it_needs(chain: Chain, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (payload, *_) = chain.manifest(1).payloads
    content = chain.store.get(payload.key)
    chain.store.delete(payload.key)
    published: list[str] = []

    def told(folder: Path) -> None:
        published.append(folder.name)
        if folder.name.endswith("2"):
            raise _Stop

    def follow() -> None:
        with pytest.raises(_Stop):
            Publisher(chain, source, "files", told).run(Following(0.05))

    following = threading.Thread(target=follow, daemon=True)
    following.start()
    wait_until(lambda: any(lease.last_error for lease in live_leases(chain)))
    (lease,) = live_leases(chain)
    assert (lease.replica, lease.version, lease.url, lease.follows) == ("files", 0, None, None)
    with pytest.raises(InputError, match="in use"):
        Publisher(chain, source, "another", told).run(None)
    chain.store.put(payload.key, content)
    following.join(20)
    assert not following.is_alive()
    assert published == [f"weight_v00000{version}" for version in range(3)]
    assert live_leases(chain) == ()


def test_without_following_a_publisher_ends_at_the_tip_or_with_the_error(chain: Chain, tmp_path: Path) -> None:
    published: list[Path] = []
    Publisher(chain, tmp_path / "full", "files", published.append, is_full=True).run(None)
    assert published == [version_folder(tmp_path / "full", version) for version in range(3)]
    assert not any((folder / INDEX).exists() for folder in published)
    chain.store.delete(chain.manifest(0).payloads[0].key)
    with pytest.raises(NotFoundError):
        Publisher(chain, tmp_path / "broken", "files", published.append).run(None)
