"""Commits and pulls of states that no memory should hold: by tiles, and only what may have changed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.numpy

from tests.chain.counting import CountingStore
from tests.codec.states import DTYPES, random_bits
from weightline.chain.files import source as source_module
from weightline.chain.files.checkpoint import write_checkpoint
from weightline.chain.files.safetensors_file import write_safetensors
from weightline.chain.files.source import FolderSource, Tile, tiles_in
from weightline.chain.read.history import Chain
from weightline.chain.replay import state as state_module
from weightline.chain.replay.state import HostState, read_state
from weightline.chain.write import version_writer
from weightline.chain.write.standalone import commit_folder
from weightline.codec import pieces
from weightline.dtypes import DTYPES as TABLE
from weightline.errors import DigestMismatchError, InputError
from weightline.format.tensor_layout import Layout
from weightline.store.memory import MemoryStore
from weightline.types import BitsArray, TensorSpec

_STATE_NBYTES = 4000
SHAPES = {f"layers.{n}.weight": (200 + 10 * n,) for n in range(12)} | {"embed": (70, 90), "empty": (0, 3)}


@pytest.fixture
def small_states(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bounds states to 4000 bytes, and notes the bytes of each that is replayed."""
    held: list[int] = []
    inner = HostState.allocate

    def allocate(self: HostState, layout: Layout) -> None:
        held.append(layout.nbytes)
        inner(self, layout)

    for module in (source_module, version_writer):
        monkeypatch.setattr(module, "STATE_NBYTES", _STATE_NBYTES)
    monkeypatch.setattr(state_module.HostState, "allocate", allocate)
    return held


def _save(folder: Path, state: dict[str, BitsArray]) -> Path:
    folder.mkdir()
    safetensors.numpy.save_file(state, folder / "model.safetensors")
    return folder


def _state(seed: int) -> dict[str, BitsArray]:
    rng = np.random.default_rng(seed)
    return {name: rng.integers(0, 1 << 16, shape, np.uint16) for name, shape in SHAPES.items()}


def _stepped(state: dict[str, BitsArray], names: Sequence[str]) -> dict[str, BitsArray]:
    rng = np.random.default_rng(1)
    return {
        name: bits ^ (rng.random(bits.shape) < 0.1).astype(np.uint16) if name in names else bits
        for name, bits in state.items()
    }


def test_a_state_is_held_a_part_at_a_time_and_its_payload_is_one(tmp_path: Path, small_states: list[int]) -> None:
    first = _state(0)
    second = _stepped(first, list(first))
    store = CountingStore(MemoryStore())
    chain = Chain(store)
    commit_folder(chain, _save(tmp_path / "first", first))
    manifest = commit_folder(chain, _save(tmp_path / "second", second))
    write_checkpoint(chain, 1, tmp_path / "pulled")
    assert len(manifest.payloads) == 1
    assert max(small_states) == 70 * 90 * 2, "the tensor that alone is larger"
    assert sorted(small_states)[-3] <= _STATE_NBYTES
    pulled = safetensors.numpy.load_file(tmp_path / "pulled" / "model.safetensors")
    assert all(np.array_equal(pulled[name], bits) for name, bits in second.items())


def test_the_payloads_of_a_commit_do_not_depend_on_how_states_are_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = _state(0)
    folders = _save(tmp_path / "first", first), _save(tmp_path / "second", _stepped(first, list(first)))
    hashes = []
    for nbytes in (1 << 27, _STATE_NBYTES, 1):
        for module in (source_module, version_writer):
            monkeypatch.setattr(module, "STATE_NBYTES", nbytes)
        chain = Chain(MemoryStore())
        hashes.append([commit_folder(chain, folder).payloads[0].sha256 for folder in folders])
    assert hashes[0] == hashes[1] == hashes[2]


def test_a_folder_without_changes_is_committed_without_a_replay(tmp_path: Path) -> None:
    folder = _save(tmp_path / "first", _state(0))
    store = CountingStore(MemoryStore())
    commit_folder(Chain(store), folder)
    store.reset()
    manifest = commit_folder(Chain(store), folder)
    assert (manifest.version, manifest.num_changed, manifest.payloads) == (1, 0, ())
    assert store.num("get_file") == 0


def test_only_tensors_that_differ_are_replayed(tmp_path: Path, small_states: list[int]) -> None:
    first = _state(0)
    chain = Chain(MemoryStore())
    commit_folder(chain, _save(tmp_path / "first", first))
    changed = ["layers.3.weight", "layers.7.weight"]
    second = _stepped(first, changed)
    manifest = commit_folder(chain, _save(tmp_path / "second", second))
    assert sum(small_states) == sum(first[name].nbytes for name in changed)
    assert manifest.num_changed == sum(np.count_nonzero(first[name] != second[name]) for name in first)
    assert np.array_equal(read_state(chain, 1).bits["layers.7.weight"], second["layers.7.weight"])


def test_a_folder_that_changes_while_it_is_read_is_not_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = _state(0)
    chain = Chain(MemoryStore())
    commit_folder(chain, _save(tmp_path / "first", first))
    folder = _save(tmp_path / "second", _stepped(first, ["layers.3.weight"]))
    inner = FolderSource.digests

    def digests_then_another_step(self: FolderSource, specs: Sequence[TensorSpec]) -> dict[str, int]:
        found = inner(self, specs)
        safetensors.numpy.save_file(_stepped(first, ["layers.2.weight", "layers.3.weight"]), folder / "next")
        (folder / "model.safetensors").write_bytes((folder / "next").read_bytes())
        return found

    monkeypatch.setattr(FolderSource, "digests", digests_then_another_step)
    with pytest.raises(DigestMismatchError, match=r"was read twice, .* Commit again when they are whole"):
        commit_folder(chain, folder)
    assert chain.tip_version() == 0


def test_a_file_that_is_cut_off_while_it_is_read_is_told(tmp_path: Path) -> None:
    folder = _save(tmp_path / "first", _state(0))
    source = FolderSource(folder)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(InputError, match="was cut off while it was read"):
        list(source.tiles(list(source.specs.values())))


def test_a_tensor_is_read_a_tile_at_a_time(tmp_path: Path) -> None:
    bits_N = np.arange(pieces.TILE + 1000, dtype=np.uint32).astype(np.uint8)
    source = FolderSource(_save(tmp_path / "first", {"wide": bits_N}))
    sizes = [bits.size for _, bits in source.tiles(list(source.specs.values()))]
    assert sizes == [pieces.TILE, 1000]
    assert np.array_equal(source.read(["wide"])["wide"], bits_N)


@pytest.mark.parametrize("seed", range(3))
def test_files_have_the_bytes_of_the_safetensors_package(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    shapes = [(), (3,), (2, 5), (0, 4), (7, 1, 2)]
    names = rng.permutation([f't{n}.é"\\\n\x7f' for n in range(3 * len(DTYPES))]).tolist()
    state: dict[TensorSpec, BitsArray] = {}
    for name, dtype in zip(names, DTYPES * 3, strict=True):
        shape = shapes[int(rng.integers(len(shapes)))] or ((1,) if dtype == "F4" else ())
        state[TensorSpec(name, dtype, shape)] = random_bits(rng, dtype, int(np.prod(shape, dtype=int)))

    def tiles(specs: Sequence[TensorSpec]) -> Iterator[Tile]:
        for spec in specs:
            yield from tiles_in(spec, state[spec])

    write_safetensors(tmp_path / "ours", state, tiles)
    entries = {
        spec.name: safetensors.TensorSpec(
            dtype=TABLE[spec.dtype].torch_name, shape=spec.shape, data_ptr=bits.ctypes.data, data_len=bits.nbytes
        )
        for spec, bits in state.items()
    }
    safetensors.serialize_file(entries, tmp_path / "theirs", {"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
