"""Bytes that nobody vouches for: a typed error, or changes that keep every promise. No crash, no lot of memory."""

from __future__ import annotations

import io
import json
import tempfile
import tracemalloc
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.chains import make_manifest, random_state
from tests.codec.states import RUNS, real_pairs, whole
from weightline.codec.capture import capture
from weightline.codec.coding import codings
from weightline.codec.geometric import encode_runs
from weightline.codec.rice import encode_rice
from weightline.codec.varint import put_numbers
from weightline.dtypes import DTYPES
from weightline.errors import ManifestError, PayloadError, UnsupportedFeatureError
from weightline.format.envelope import reserve_header, write_header
from weightline.format.manifest import Manifest
from weightline.format.payload import open_payload
from weightline.format.shortcut import Shortcut
from weightline.format.table import ChunkEntry, pack_table
from weightline.format.write_payload import write_anchor, write_delta
from weightline.types import BitsArray, Segment, TensorSpec

CODINGS = sorted(codings())
DELTA = {"weightline": "1", "kind": "delta", "coding": "gap"}
ANCHOR = {"weightline": "1", "kind": "anchor", "coding": "ordered-pco"}
W = whole("w", "BF16", 100)
MIB = 1 << 20


def read(path: Path) -> None:
    """Read everything; check what comes out as a caller that trusts it would."""
    payload = open_payload(path)
    if payload.kind == "anchor":
        for segment, bits_N in payload.read_anchor(None):
            assert bits_N.size == segment.length
        return
    for changes in payload.read_changes(lambda segment: segment.length < 1 << 20, zeros):
        assert (np.diff(changes.positions_K) > 0).all()
        assert changes.positions_K.size == changes.old_K.size == changes.new_K.size
        assert (changes.old_K != changes.new_K).all()
        if changes.num_changed:
            assert changes.positions_K[0] >= 0
            assert changes.positions_K[-1] < changes.segment.length


def zeros(segment: Segment) -> BitsArray:
    width = {"BF16": np.uint16, "U8": np.uint8, "F32": np.uint32}.get(segment.tensor.dtype, np.uint16)
    return np.zeros(segment.length, width)


def put(path: Path, chunks: bytes, table: bytes, metadata: dict[str, str] = DELTA) -> Path:
    with path.open("wb") as file:
        reserve_header(file)
        file.write(chunks + table)
        write_header(file, metadata, len(chunks), len(table))
    return path


def refuse(path: Path) -> str:
    """The rule that a payload breaks."""
    with pytest.raises(PayloadError) as caught:
        read(path)
    return str(caught.value.facts["rule"])


def deflated(*numbers: int, tail: bytes = b"") -> bytes:
    out = bytearray()
    put_numbers(out, *numbers)
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    return deflate.compress(bytes(out) + tail) + deflate.flush()


def sound(path: Path, coding: str) -> bytes:
    segment, old_N, _ = real_pairs(RUNS[0])[1]
    base_N = np.zeros_like(old_N)
    new_N = base_N.copy()
    new_N[::3] += np.arange(1, new_N[::3].size + 1, dtype=np.uint16)
    write_delta(path, [capture(segment, base_N, new_N, ranked=True), capture(W, *[zeros(W)] * 2, ranked=True)], coding)
    return path.read_bytes()


@pytest.mark.parametrize("coding", [*CODINGS, "anchor"])
def test_any_damage_is_refused_or_harmless(tmp_path: Path, coding: str) -> None:
    path = tmp_path / "p"
    if coding == "anchor":
        write_anchor(path, [(W, np.arange(100, dtype=np.uint16))])
        good = path.read_bytes()
    else:
        good = sound(path, coding)
    rng = np.random.default_rng(13)
    num_refused = 0
    for _ in range(600):
        bad = bytearray(good)
        for _ in range(rng.integers(1, 4)):
            bad[rng.integers(0, len(bad))] = rng.integers(0, 256)
        path.write_bytes(bad)
        try:
            read(path)
        except (PayloadError, UnsupportedFeatureError):
            num_refused += 1
    assert num_refused > 100


@pytest.mark.parametrize("coding", [*CODINGS, "anchor"])
def test_every_truncation_is_refused(tmp_path: Path, coding: str) -> None:
    path = tmp_path / "p"
    if coding == "anchor":
        write_anchor(path, [(W, np.arange(100, dtype=np.uint16))])
        good = path.read_bytes()
    else:
        good = sound(path, coding)
    for length in range(0, len(good), 1 if len(good) < 600 else 7):
        path.write_bytes(good[:length])
        refuse(path)
    path.write_bytes(good + b"\0")
    refuse(path)


@given(st.binary(max_size=400))
def test_any_bytes_as_table_or_chunks(junk: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "p"
        for chunks, table in ((b"", junk), (junk, deflated(0, 0)), (b"", deflated(tail=junk)), (junk, one_chunk(junk))):
            for metadata in (DELTA, DELTA | {"coding": "gap-by-magnitude"}, ANCHOR):
                try:
                    read(put(path, chunks, table, metadata))
                except PayloadError:
                    continue


def one_chunk(junk: bytes, num_changed: int = 60) -> bytes:
    half = len(junk) // 2
    return pack_table([W], [ChunkEntry("BF16", 100, num_changed, (half, len(junk) - half))])


def header(text: str, data: bytes = b"") -> bytes:
    return len(text).to_bytes(8, "little") + text.encode() + data


ENTRIES = (
    '"chunks":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"table":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}'
)
META = '"__metadata__":{"weightline":"1","kind":"delta","coding":"gap"}'


HEADERS = [
    (b"", "header-length"),
    (b"\0" * 7, "header-length"),
    (b"\xff" * 8, "header-length"),
    (b" " * 300, "header-length"),
    ((1 << 20).to_bytes(8, "little") + b"{" * (1 << 20), "header-length"),
    (header("[]"), "header-json"),
    (header("{}"), "header-json"),
    (header("{" * 60_000), "header-json"),
    (header("[" * 60_000), "header-json"),
    (header('{"__metadata__":1}'), "header-json"),
    (header("\udcff".encode("utf-8", "surrogatepass").decode("latin-1")), "header-json"),
    (header(f"{{{META}}}"), "header-entries"),
    (header(f"{{{META},{ENTRIES},\"more\":{{}}}}"), "header-json"),
    (header(f"{{{META},{ENTRIES},{ENTRIES}}}", b"\x03\0"), "header-json"),
    (header(f"{{{META},{ENTRIES}}}", b"\x03\0\0"), "header-entries"),
    (header(f"{{{META},{ENTRIES}}}".replace("[0,2]", "[1,2]"), b"\x03\0"), "header-entries"),
    (header(f"{{{META},{ENTRIES}}}".replace("U8", "I8"), b"\x03\0"), "header-entries"),
    (header(f"{{{META},{ENTRIES}}}".replace("[0]", "[-1]"), b"\x03\0"), "header-entries"),
    (header(f"{{{META},{ENTRIES}}}".replace("delta", "omega"), b"\x03\0"), "kind"),
    (header(f"{{{META},{ENTRIES}}}", b"\x03\0"), "table-number"),
]  # fmt: skip


@pytest.mark.parametrize(("raw", "rule"), HEADERS)
def test_headers(tmp_path: Path, raw: bytes, rule: str) -> None:
    (tmp_path / "p").write_bytes(raw)
    assert refuse(tmp_path / "p") == rule


@pytest.mark.parametrize("change", [{"weightline": "2"}, {"coding": "gap-by-moon"}, {"kind": "anchor"}])
def test_what_this_release_does_not_know_is_said_so(tmp_path: Path, change: dict[str, str]) -> None:
    with pytest.raises(UnsupportedFeatureError):
        read(put(tmp_path / "p", b"", deflated(0, 0), DELTA | change))


BF16 = list(DTYPES).index("BF16")


TABLES = [
    (b"", "table-deflate"),
    (deflated(0, 0) + b"\0", "table-deflate"),
    (deflated(0, 0, 0), "table-trailing"),
    (deflated(1 << 62), "table-count"),
    (deflated(0, 1 << 62), "table-count"),
    (deflated(1 << 64), "table-number"),
    (deflated(5), "table-number"),
    (deflated(1, 1, 0), "table-name"),
    (deflated(1, 0, 1 << 40), "table-name"),
    (deflated(1, 0, 1, tail=b"\xff\0\0\x01\0"), "table-name"),
    (deflated(1, 0, 0, 99), "table-dtype"),
    (deflated(1, 0, 0, BF16, 33), "table-shape"),
    (deflated(1, 0, 0, BF16, 2, 1 << 40, 1 << 40, 1, 0), "table-shape"),
    (deflated(1, 0, 0, BF16, 1, 5, 2), "table-flag"),
    (deflated(1, 0, 0, BF16, 1, 5, 0, 3, 3, 0), "segment-range"),
    (deflated(1, 0, 0, BF16, 1, 1 << 50, 1, 0), "segment-count"),
]  # fmt: skip


@pytest.mark.parametrize(("table", "rule"), TABLES)
def test_tables(tmp_path: Path, table: bytes, rule: str) -> None:
    assert refuse(put(tmp_path / "p", b"", table)) == rule


def part(start: int, length: int, name: str = "w", size: int = 100) -> Segment:
    return Segment(TensorSpec(name, "BF16", (size,)), start, length)


LAYOUTS = [
    ([part(0, 60), part(50, 50)], [("BF16", 110, 0, (0, 0))], b"", "segment-overlap"),
    ([part(0, 100), part(0, 100)], [("BF16", 200, 0, (0, 0))], b"", "segment-overlap"),
    ([part(0, 9), part(0, 9, size=9)], [("BF16", 18, 0, (0, 0))], b"", "segment-tensor"),
    ([W], [], b"", "chunk-cover"),
    ([W], [("BF16", 99, 0, (0, 0))], b"", "chunk-cover"),
    ([W], [("BF16", 101, 0, (0, 0))], b"", "chunk-cover"),
    ([W], [("F32", 100, 0, (0, 0))], b"", "chunk-cover"),
    ([W], [("BF16", 100, 0, (0, 0)), ("BF16", 0, 0, (0, 0))], b"", "chunk-pieces"),
    ([part(0, 1, str(n)) for n in range(1025)], [("BF16", 1025, 0, (0, 0))], b"", "chunk-pieces"),
    ([W], [("BF16", 100, 101, (0, 0))], b"", "chunk-count"),
    ([W], [("BF16", 100, 0, (1, 0))], b"", "chunk-bytes"),
    ([W], [("BF16", 100, 0, (0, 1 << 60))], b"", "chunk-bytes"),
    ([W], [("BF16", 100, 0, (0, 0))], b"x", "chunk-bytes"),
    ([W], [("BF16", 100, 0, (1, 0))], b"x", "stream-length"),
    ([W], [("BF16", 100, 0, (0, 1))], b"x", "stream-length"),
    ([W], [("BF16", 100, 1, (0, 0))], b"", "position-head"),
]  # fmt: skip


@pytest.mark.parametrize(("segments", "entries", "chunks", "rule"), LAYOUTS)
def test_layouts(tmp_path: Path, segments: Sequence[Segment], entries: list, chunks: bytes, rule: str) -> None:
    table = pack_table(segments, [ChunkEntry(*entry) for entry in entries])
    assert refuse(put(tmp_path / "p", chunks, table)) == rule


ANCHOR_ENTRIES = [
    (("BF16", 100, 99, (0, 0)), "anchor-chunk"),
    (("BF16", 100, 100, (0, 0)), "anchor-chunk"),
    (("BF16", 100, 100, (0, 1)), "anchor-chunk"),
    (("BF16", 100, 100, (1, 0)), "stream-decode"),
]  # fmt: skip


@pytest.mark.parametrize(("entry", "rule"), ANCHOR_ENTRIES)
def test_anchors(tmp_path: Path, entry: tuple, rule: str) -> None:
    assert refuse(put(tmp_path / "p", b"x" * sum(entry[3]), pack_table([W], [ChunkEntry(*entry)]), ANCHOR)) == rule


def crafted(tmp_path: Path, coding: str, positions: bytes, steps: bytes, num_changed: int) -> Path:
    table = pack_table([W], [ChunkEntry("BF16", 100, num_changed, (len(positions), len(steps)))])
    return put(tmp_path / "p", positions + steps, table, DELTA | {"coding": coding})


def runs(values: list[int], counts: list[int], levels: list[int]) -> bytes:
    return encode_runs(np.array(values, np.uint64), np.array(counts), np.array(levels))


def rice(values: list[int]) -> bytes:
    return encode_rice(np.array(values, np.uint32), 5)


#: Says that a Rice stream of parameter 5 follows.
RICE_5 = b"\x85\x02"
#: Streams of two changes that break no rule.
SOUND_POSITIONS = bytes([60]) + runs([97, 1], [2], [60])
UNIT_STEPS = b"\0\0"


GAP_POSITIONS = [
    (bytes([60]) + runs([98, 1], [2], [60]), "position-range"),
    (bytes([60]) + runs([100, 0], [2], [60]), "position-range"),
    (bytes([60]) + runs([2**63 - 1, 2**63 - 1], [2], [60]), "position-range"),
    (bytes([60]) + runs([1] * 40, [40], [60]), "stream-length"),
    (b"\xcc\x01" + runs([1, 1], [2], [60]), "stream-level"),
    (bytes([60]) + b"\xff\xff\xff\xff\x7f", "stream-length"),
    (RICE_5 + rice([98, 1]), "position-range"),
    (RICE_5 + rice([2**32 - 1, 2**32 - 1]), "position-range"),
    (RICE_5 + rice([1] * 40), "stream-length"),
    (RICE_5 + rice([1, 1])[:7], "stream-length"),
    (RICE_5 + bytes(8), "stream-length"),
    (RICE_5, "stream-length"),
    (b"\xa0\x02" + rice([1, 1]), "stream-level"),
]  # fmt: skip


@pytest.mark.parametrize(("positions", "rule"), GAP_POSITIONS)
def test_gap_positions(tmp_path: Path, positions: bytes, rule: str) -> None:
    assert refuse(crafted(tmp_path, "gap", positions, UNIT_STEPS, 2)) == rule


def test_the_crafted_gap_positions_are_sound_otherwise(tmp_path: Path) -> None:
    read(crafted(tmp_path, "gap", SOUND_POSITIONS, UNIT_STEPS, 2))


MAGNITUDE_POSITIONS = [
    (b"", "class-head"),
    (b"\x01", "piece-count"),
    (b"\x02", "class-head"),
    (b"\x02\xff\x01\x02\x02\x00", "class-head"),
    (b"\x02\x00\x01\x03\x3c", "class-count"),
    (b"\x02\x00\x00", "class-count"),
    (b"\x02\x00\x01\x02\x3c" + runs([100, 0], [2], [60]), "position-range"),
    (b"\x02\x00\x01\x02\x3c" + runs([98, 1], [2], [60]), "position-range"),
    (b"\x02\x05\x01\x02\x3c" + runs([0, 1], [2], [60]), "position-range"),
]  # fmt: skip


@pytest.mark.parametrize(("positions", "rule"), MAGNITUDE_POSITIONS)
def test_magnitude_positions(tmp_path: Path, positions: bytes, rule: str) -> None:
    assert refuse(crafted(tmp_path, "gap-by-magnitude", positions, UNIT_STEPS, 2)) == rule


def test_the_crafted_magnitude_positions_are_sound_otherwise(tmp_path: Path) -> None:
    positions = b"\x02\x00\x01\x02\x3c" + runs([97, 1], [2], [60])
    read(crafted(tmp_path, "gap-by-magnitude", positions, UNIT_STEPS, 2))


DEVIATIONS = [([1, 1], "class-count"), ([0, 2], "class-count"), ([5, 6], "class-count")]


@pytest.mark.parametrize(("deviations", "rule"), DEVIATIONS)
def test_counts_of_classes_in_pieces(tmp_path: Path, deviations: list[int], rule: str) -> None:
    segments = [part(0, 50), part(50, 50)]
    positions = b"\x01\x01\x00\x01\x02\x3c" + runs([*deviations, 3, 4], [2, 2], [44, 60])
    entry = ChunkEntry("BF16", 100, 2, (len(positions), 2))
    path = put(tmp_path / "p", positions + UNIT_STEPS, pack_table(segments, [entry]), DELTA | {"coding": CODINGS[1]})
    assert refuse(path) == rule


STEPS = [
    (b"", "step-head"),
    (b"\0", "step-head"),
    (b"\0\0\0", "stream-length"),
    (b"\0\x03\x3c\x3c", "step-count"),
    (b"\0\x02\x3c\x3c" + runs([0, 1, 0, 0], [2, 2], [60, 60]), "step-count"),
    (b"\0\x01\x3c\x3c" + runs([2, 0], [1, 1], [60, 60]), "step-count"),
    (b"\0\x01\x3c\x3c" + runs([0, 2**15 - 2], [1, 1], [60, 60]), "step-range"),
    (b"\0\x01\x3c\x3c" + runs([0, 2**63 - 1], [1, 1], [60, 60]), "step-range"),
]  # fmt: skip


@pytest.mark.parametrize(("steps", "rule"), STEPS)
def test_steps(tmp_path: Path, steps: bytes, rule: str) -> None:
    assert refuse(crafted(tmp_path, "gap", SOUND_POSITIONS, steps, 2)) == rule


def test_the_largest_steps_are_sound(tmp_path: Path) -> None:
    for signs, size in ((b"\x01", 2**15 - 2), (b"\x00", 2**15 - 3)):
        steps = signs + b"\x01\x3c\x3c" + runs([0, size], [1, 1], [60, 60])
        read(crafted(tmp_path, "gap", SOUND_POSITIONS, steps, 2))


@pytest.mark.parametrize("name", ["../../etc/passwd", "/abs", "a\0b", "a\nb", "\u202e", "", "CON", "x" * 65_000])
def test_names_are_only_data(tmp_path: Path, name: str) -> None:
    segment = whole(name, "BF16", 3)
    old_N, new_N = np.zeros(3, np.uint16), np.array([1, 0, 0], np.uint16)
    write_delta(tmp_path / "p", [capture(segment, old_N, new_N)])
    [changes] = open_payload(tmp_path / "p").read_changes(None, lambda _: old_N)
    assert changes.segment.tensor.name == name
    assert [path.name for path in tmp_path.iterdir()] == ["p"]


def bomb_of_names() -> bytes:
    return deflated((1 << 18) + 1, tail=bytes([0, 0, BF16, 1, 0, 1]) * (1 << 18))


def bomb_of_chunks() -> bytes:
    return deflated(0, (1 << 18) + 1, tail=bytes([BF16, 1, 0, 0, 0]) * (1 << 18))


def bomb_of_zeros() -> bytes:
    return deflated(tail=bytes(200 * MIB))


def bomb_of_tiles() -> bytes:
    """2**40 elements in a table of a few bytes, and one chunk that claims them all."""
    return pack_table([whole("w", "BF16", 1 << 40)], [ChunkEntry("BF16", 1 << 40, 0, (0, 0))])


def bomb_of_changes() -> bytes:
    return pack_table([whole("w", "U8", 1 << 32)], [ChunkEntry("U8", 1 << 32, 1 << 31, (0, 0))])


def bomb_of_empty_tiles() -> bytes:
    """An anchor of 2**36 elements, each tile in a stream of no bytes."""
    return pack_table([whole("w", "BF16", 1 << 36)], [ChunkEntry("BF16", 1 << 22, 1 << 22, (0, 0))] * (1 << 14))


BOMBS = [
    (bomb_of_names, DELTA),
    (bomb_of_chunks, DELTA),
    (bomb_of_zeros, DELTA),
    (bomb_of_tiles, DELTA),
    (bomb_of_changes, DELTA),
    (bomb_of_empty_tiles, ANCHOR),
]


@pytest.mark.parametrize(("bomb", "metadata"), BOMBS)
def test_bombs_are_refused_in_little_memory(
    tmp_path: Path, bomb: Callable[[], bytes], metadata: dict[str, str]
) -> None:
    path = put(tmp_path / "p", b"", bomb(), metadata)
    assert path.stat().st_size < MIB
    tracemalloc.start()
    try:
        refuse(path)
        assert tracemalloc.get_traced_memory()[1] < 20 * MIB
    finally:
        tracemalloc.stop()


def test_a_claim_of_changes_without_bytes_is_refused_in_bounded_memory(tmp_path: Path) -> None:
    size = 12 * MIB
    path = put(tmp_path / "p", b"", pack_table([whole("w", "U8", size)], [ChunkEntry("U8", size, size, (0, 0))]))
    tracemalloc.start()
    try:
        with pytest.raises(PayloadError, match="truncated"):
            list(open_payload(path).read_changes(None, zeros))
        assert tracemalloc.get_traced_memory()[1] < MIB
    finally:
        tracemalloc.stop()


def test_a_written_header_reads_back() -> None:
    file = io.BytesIO()
    reserve_header(file)
    write_header(file, DELTA, 10**14, 10**8)
    raw = file.getvalue()
    assert len(raw) == 256
    assert int.from_bytes(raw[:8], "little") == 248
    assert json.loads(raw[8:])["table"]["data_offsets"] == [10**14, 10**14 + 10**8]


@pytest.mark.parametrize("parse", [Manifest.from_bytes, Shortcut.from_bytes])
@pytest.mark.parametrize("features", ["[{}]", "[[]]", "[1]", "{}", '"x"', "null"])
def test_features_that_are_no_names(parse: Callable[[bytes], object], features: str) -> None:
    """Found by fuzz/manifest.py: a feature that cannot be hashed."""
    with pytest.raises(ManifestError):
        parse(f'{{"format":"weightline/1","features":{features}}}'.encode())


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), -float("inf")])
def test_a_loss_that_is_no_number_does_not_spoil_a_version(loss: float) -> None:
    """Written as null it would make a manifest that no reader takes."""
    state = random_state(1)
    manifest = make_manifest(state, 0, "0" * 32, (), is_anchor=True)
    logged = Manifest.model_validate(manifest.model_dump() | {"metrics": {"loss": loss, "reward": 1.0}})
    assert logged.metrics == {"reward": 1.0}
    assert Manifest.from_bytes(logged.to_bytes()) == logged
