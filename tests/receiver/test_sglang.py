"""The folders that SGLang's /pull_weights reads, read back by the rules of that layout."""

from __future__ import annotations

import json
import shutil
import uuid
import zlib
from pathlib import Path

import numpy as np
import pytest
import zstandard
from safetensors import safe_open

from tests.chains import commit_state, nudged, random_state
from weightline.chain import Chain, open_chain
from weightline.chain.checkpoint import write_checkpoint
from weightline.chain.target import FileTarget
from weightline.errors import InputError, VersionNotFoundError
from weightline.format import keys
from weightline.receiver.engines.sglang import INDEX, publish_up_to, publish_version, version_folder


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


def pull(source_dir: Path, local: Path, applied: int, target: int) -> None:
    """What a reader of the layout does: patch a plain checkpoint in place, one version after the other, checked."""
    for version in range(applied + 1, target + 1):
        folder = version_folder(source_dir, version)
        metadata = json.loads((folder / INDEX).read_text())["metadata"]
        assert (int(metadata["version"]), int(metadata["base_version"])) == (version, version - 1)
        assert metadata["delta_encoding"] == "xor"
        assert metadata["compression_format"] == "zstd"
        assert metadata["checksum_format"] == "adler32"
        for path in sorted(folder.glob("*.safetensors")):
            _patch(local, path)


def _patch(local: Path, path: Path) -> None:
    entries = FileTarget(local)._entries
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
    held, expected = FileTarget(folder), FileTarget(tmp_path / f"expected-{version}")
    assert held.specs == expected.specs
    for name, bits_N in expected.read(expected.specs).items():
        np.testing.assert_array_equal(held.read([name])[name], bits_N, strict=True)


def test_pulled_versions_are_the_chains_bit_for_bit(chain: Chain, tmp_path: Path) -> None:
    source, local = tmp_path / "source", tmp_path / "local"
    assert publish_up_to(chain, 2, source) == [version_folder(source, version) for version in range(3)]
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
    publish_up_to(chain, 1, source)
    before = {path: path.stat().st_mtime_ns for path in source.rglob("*")}
    assert publish_up_to(chain, 1, source) == []
    assert {path: path.stat().st_mtime_ns for path in source.rglob("*")} == before
    assert publish_up_to(chain, 2, source) == [version_folder(source, 2)]
    assert json.loads((version_folder(source, 2) / INDEX).read_text())["weight_map"] == {}


def test_nothing_is_left_of_a_version_that_cannot_be_published(chain: Chain, tmp_path: Path) -> None:
    source = tmp_path / "source"
    with pytest.raises(VersionNotFoundError):
        publish_version(chain, 9, source)
    assert not source.exists()
    with pytest.raises(VersionNotFoundError):
        publish_up_to(chain, 9, source)


def test_a_gap_in_the_chain_is_refused(chain: Chain, tmp_path: Path) -> None:
    chain.store.delete(keys.commit(0))
    with pytest.raises(InputError, match=r"versions 0 to 2 of .* are not all there: publish 1 in full first"):
        publish_up_to(chain, 2, tmp_path / "source")
