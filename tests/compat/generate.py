"""Writes the chains that this release leaves behind for later ones to read. Run once, by hand, for each release.

python -m tests.compat.generate

A fixture that exists is left alone: a later release that cannot read it is broken, not the fixture.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import numpy as np

from tests.chains import commit_state
from tests.codec.states import real_pairs
from weightline.chain.read.history import Chain
from weightline.chain.read.records import EVALUATIONS, write_record
from weightline.chain.read.refs import move_ref
from weightline.chain.replay.state import HostState, read_state
from weightline.chain.upkeep.compact import CompactionPlan, write_compaction
from weightline.chain.upkeep.retention import expire_before
from weightline.chain.write import version as version_module
from weightline.chain.write.standalone import commit_folder, commit_revert
from weightline.chain.write.version import mark_upgraded
from weightline.format.manifest import FORMAT_1, FORMAT_2
from weightline.store.local import LocalStore
from weightline.types import BitsArray

FOLDER = Path(__file__).parent / "data"
State = dict[str, BitsArray]
#: Elements kept of each real tensor, so that the fixture stays small.
_KEPT = 1200


def states() -> list[State]:
    """Five states: two of a trained model, then steps of one unit, a wide change with NaN and -0.0, and a few more."""
    pairs = [pair for pair in real_pairs("sft-3e-6") if pair[1].size >= _KEPT][:2]
    first = {segment.tensor.name: old_N[:_KEPT].copy() for segment, old_N, _ in pairs}
    first |= {"scale": np.array(0x3F80, np.uint16), "frozen.bias": np.arange(7, dtype=np.uint16)}
    second = first | {segment.tensor.name: new_N[:_KEPT].copy() for segment, _, new_N in pairs}
    third = {name: bits.copy() for name, bits in second.items()}
    third[pairs[0][0].tensor.name][::50] ^= np.uint16(1)
    third["scale"] = np.array(0x3F81, np.uint16)
    fourth = {name: bits.copy() for name, bits in third.items()}
    fourth[pairs[1][0].tensor.name][:4] = [0x7FC0, 0x8000, 0xFF80, 0x0001]
    fifth = {name: bits.copy() for name, bits in fourth.items()}
    fifth[pairs[1][0].tensor.name][100:140] += np.uint16(3)
    return [first, second, third, fourth, fifth]


def mx_tensors(number: int) -> dict[str, tuple[str, tuple[int, int], bytes]]:
    """A layer in MXFP4 as a checkpoint of it has it, in its number-th state: (dtype, shape in the file, bytes)."""
    rng = np.random.default_rng(11)
    blocks, scales = (rng.integers(0, 256, size, dtype=np.uint8) for size in (512, 32))
    weight = rng.integers(0, 256, 64, dtype=np.uint8)
    for state in range(number):
        blocks[state::41] ^= np.uint8(0x11)
        scales[state::13] += np.uint8(1)
        weight[state::17] += np.uint8(1)
    return {
        "mlp.blocks": ("F4", (32, 32), blocks.tobytes()),
        "mlp.scales": ("F8_E8M0", (32, 1), scales.tobytes()),
        "norm.weight": ("BF16", (4, 8), weight.tobytes()),
    }


@contextmanager
def _new_chains_in(written_as: str) -> Iterator[None]:
    before = version_module.NEW_CHAINS
    version_module.NEW_CHAINS = written_as  # type: ignore[assignment]
    try:
        yield
    finally:
        version_module.NEW_CHAINS = before


def written_in(written_as: str, write: Callable[[Path], Chain]) -> Callable[[Path], Chain]:
    """Writes a chain in one of the formats."""

    def write_in(folder: Path) -> Chain:
        with _new_chains_in(written_as):
            return write(folder)

    return write_in


def write_upgraded_chain(folder: Path) -> Chain:
    """A chain that began in format 1 and went on in format 2 from version 2 on."""
    chain = Chain(LocalStore(folder))
    first, *others = states()
    with _new_chains_in(FORMAT_1):
        commit_state(chain, first, is_milestone=True)
    before = first
    for number, state in enumerate(others):
        if number == 1:
            mark_upgraded(chain)
        commit_state(chain, state, before, stage="grpo" if number > 1 else "sft", provenance={"host": "h"})
        before = state
    return _with_refs(chain)


def write_chain(folder: Path) -> Chain:
    """Every kind of object: anchor, deltas in both codings, revert, shortcuts, refs, a record, a horizon."""
    chain = Chain(LocalStore(folder))
    first, *others = states()
    commit_state(chain, first, is_milestone=True)
    before = first
    for number, state in enumerate(others):
        coding = ("gap", "gap-by-magnitude")[number % 2]
        commit_state(chain, state, before, coding=coding, stage="grpo" if number > 1 else "sft")
        before = state
    return _with_refs(chain)


def write_mx_chain(folder: Path) -> Chain:
    """The same of a model with F4 and F8_E8M0, with small files in folders below it."""
    chain = Chain(LocalStore(folder))
    for number in range(5):
        with tempfile.TemporaryDirectory() as name:
            _write_mx_folder(Path(name), number)
            commit_folder(chain, Path(name), coding=("gap-by-magnitude", "gap")[number % 2], stage="sft")
    return _with_refs(chain)


def _write_mx_folder(folder: Path, number: int) -> None:
    header: dict[str, object] = {}
    data = b""
    for name, (dtype, shape, raw) in mx_tensors(number).items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    (folder / "config.json").write_text('{"model_type": "toy"}')
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")


def _with_refs(chain: Chain) -> Chain:
    commit_revert(chain, 2)
    direct = dict.fromkeys(range(5), 0.0)
    write_compaction(chain, CompactionPlan(5, (0, 3), direct, writes_anchor=True), coding="gap-by-magnitude")
    write_compaction(chain, CompactionPlan(4, (1,), direct, writes_anchor=False), coding="gap")
    move_ref(chain, "best", 1)
    move_ref(chain, "best", 3)
    move_ref(chain, "v1.0", 2, is_tag=True)
    write_record(chain, EVALUATIONS, 3, "arithmetic", {"status": "done", "score": 0.5})
    expire_before(chain, 1)
    return chain


#: Name of a fixture's folder -> what writes it.
GENERATORS = {
    "chain-v1-by-0.1.0": written_in(FORMAT_1, write_chain),
    "chain-v1-mx": written_in(FORMAT_1, write_mx_chain),
    "chain-v2": written_in(FORMAT_2, write_chain),
    "chain-v2-mx": written_in(FORMAT_2, write_mx_chain),
    "chain-v2-upgraded": write_upgraded_chain,
}


def expected(chain: Chain) -> dict[str, object]:
    """What any release must find in it, by version: commit id, digests, and the sha256 of the bits."""
    found = {}
    for manifest in chain.manifests():
        state = read_state(chain, manifest.version)
        found[str(manifest.version)] = {
            "commit_id": manifest.commit_id,
            "kind": manifest.kind,
            "coding": manifest.coding,
            "digests": manifest.digests,
            "sha256": sha256_of_state(state),
        }
    return {"release": version("weightline"), "oldest_kept": 1, "versions": found}


def sha256_of_state(state: HostState) -> dict[str, str]:
    """Of the little-endian bits of every tensor."""
    return {
        name: hashlib.sha256(bits_N.astype(bits_N.dtype.newbyteorder("<")).tobytes()).hexdigest()
        for name, bits_N in sorted(state.bits.items())
    }


def main() -> None:
    for name, write in GENERATORS.items():
        folder = FOLDER / name
        if folder.exists():
            continue
        chain = write(folder)
        for hint in (folder / "hints").glob("*"):
            hint.unlink()
        folder.with_suffix(folder.suffix + ".json").write_text(json.dumps(expected(chain), indent=1) + "\n")


if __name__ == "__main__":
    main()
