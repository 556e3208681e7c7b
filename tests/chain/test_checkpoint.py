"""pull: a folder that is whole or says that it is not, written a file at a time, and again after a crash."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.chains import commit_state, nudged, random_state
from weightline.chain.files import checkpoint
from weightline.chain.files.assets import upload_files
from weightline.chain.files.checkpoint import MARKER, write_checkpoint
from weightline.chain.files.source import FolderSource, VersionSource
from weightline.chain.read.history import Chain
from weightline.errors import InputError
from weightline.store.memory import MemoryStore
from weightline.testing.faults import FaultStore
from weightline.types import BitsArray

_SHAPES = {"a": (20, 8), "b": (30,), "c": (), "d": (0, 4), "e": (100,)}
_STATES = [random_state(0, _SHAPES)]
_STATES.append(nudged(_STATES[0], 1))


class CrashError(BaseException):
    """The process is gone."""


@pytest.fixture
def chain(tmp_path: Path) -> Chain:
    made = Chain(MemoryStore("memory://pulled"))
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "config.json").write_text('{"model_type": "toy"}')
    commit_state(made, _STATES[0], assets=upload_files(made.store, tmp_path / "small"))
    commit_state(made, _STATES[1], _STATES[0])
    return made


def _is_whole(folder: Path, version: int) -> bool:
    loaded: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        loaded |= load_file(path)
    return all(
        np.array_equal(loaded[name].view(torch.int16).numpy().view(np.uint16), bits)
        for name, bits in _STATES[version].items()
    )


def test_shards_are_read_and_written_one_at_a_time(
    chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No reader has to hold the model (SPEC "Goals"): never more than one file of it."""
    asked: list[int] = []

    class Counting(VersionSource):
        def read(self, names: Iterable[str]) -> dict[str, BitsArray]:
            bits = super().read(list(names))
            asked.append(sum(one.nbytes for one in bits.values()))
            return bits

    monkeypatch.setattr(checkpoint, "VersionSource", Counting)
    write_checkpoint(chain, 1, tmp_path / "out", max_shard_nbytes=400)
    assert asked == [320 + 60 + 2, 200]
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 582
    assert set(index["weight_map"]) == set(_SHAPES)
    assert _is_whole(tmp_path / "out", 1)
    assert set(FolderSource(tmp_path / "out").specs) == set(_SHAPES)


def test_a_crash_anywhere_leaves_no_marker_and_the_pull_can_be_repeated(chain: Chain, tmp_path: Path) -> None:
    whole = FaultStore(chain.store, lambda *_: None)
    write_checkpoint(Chain(whole), 1, tmp_path / "whole")
    for crash_at in range(whole.num_operations):

        def plan(number: int, verb: str, key: str, crash_at: int = crash_at) -> None:
            if number == crash_at:
                raise CrashError

        out = tmp_path / f"out-{crash_at}"
        with pytest.raises(CrashError):
            write_checkpoint(Chain(FaultStore(chain.store, plan)), 1, out)
        assert not (out / MARKER).exists()
        write_checkpoint(chain, 1, out)
        assert _is_whole(out, 1)


@pytest.mark.parametrize("moved", [(), ("config.json",), ("config.json", "model.safetensors")])
def test_what_a_killed_pull_left_is_thrown_away(chain: Chain, tmp_path: Path, moved: tuple[str, ...]) -> None:
    """kill -9 leaves the hidden folder, and in it what safetensors left."""
    out = tmp_path / "out"
    write_checkpoint(chain, 0, out)
    partial = out / ".weightline-partial"
    partial.mkdir()
    for path in list(out.iterdir()):
        if path.is_file() and path.name not in moved:
            path.rename(partial / path.name)
    (partial / ".tmpGq3x").write_bytes(b"half a file")
    write_checkpoint(chain, 0, out)
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.safetensors", MARKER]
    assert _is_whole(out, 0)
    partial.mkdir()
    (out / "mine.txt").write_text("")
    (out / MARKER).unlink()
    with pytest.raises(InputError, match="not empty"):
        write_checkpoint(chain, 0, out)


def test_what_a_killed_pull_moved_of_a_folder_below_is_thrown_away(chain: Chain, tmp_path: Path) -> None:
    (tmp_path / "small" / "code").mkdir()
    (tmp_path / "small" / "code" / "a.py").write_text("a = 1")
    commit_state(chain, _STATES[1], _STATES[1], assets=upload_files(chain.store, tmp_path / "small"))
    out = tmp_path / "out"
    (out / ".weightline-partial").mkdir(parents=True)
    (out / "code").mkdir()
    (out / "code" / "a.py").write_text("half")
    write_checkpoint(chain, 2, out)
    assert (out / "code" / "a.py").read_text() == "a = 1"
    assert _is_whole(out, 1)


def test_an_empty_folder_will_do(chain: Chain, tmp_path: Path) -> None:
    """As a mounted volume is."""
    (tmp_path / "out").mkdir()
    before = (tmp_path / "out").stat().st_ino
    write_checkpoint(chain, 1, tmp_path / "out")
    assert (tmp_path / "out").stat().st_ino == before
    assert _is_whole(tmp_path / "out", 1)


def test_others_may_read_what_was_pulled(chain: Chain, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_checkpoint(chain, 1, tmp_path / "out")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {0o640}


def test_a_place_that_cannot_be_is_told(chain: Chain, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file: name a new folder"):
        write_checkpoint(chain, 1, tmp_path / "file")
    with pytest.raises(InputError, match="cannot be written"):
        write_checkpoint(chain, 1, tmp_path / "file" / "below")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / MARKER).write_text("")
    with pytest.raises(InputError, match="not empty"):
        write_checkpoint(chain, 1, tmp_path / "out")
