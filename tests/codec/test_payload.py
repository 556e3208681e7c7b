from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from tests.codec.states import DTYPES, RUNS, Pair, changed, pairs, random_bits, real_pairs, whole
from weightline.codec.capture import capture
from weightline.codec.coding import codings
from weightline.codec.pieces import TILE
from weightline.errors import InputError, PayloadError, UnsupportedFeatureError
from weightline.format import layout
from weightline.format.payload import Payload, open_payload
from weightline.format.write_payload import PayloadInfo, write_anchor, write_delta
from weightline.types import BitsArray, Changes, Segment, TensorSpec

CODINGS = sorted(codings())


def write_pairs(path: Path, states: Iterable[Pair], coding: str, **options: int) -> PayloadInfo:
    return write_delta(path, (capture(*pair, ranked=True) for pair in states), coding, **options)


def read_all(payload: Payload, states: Iterable[Pair], **options: int) -> Iterator[Changes]:
    old = {segment: old_N for segment, old_N, _ in states}
    return payload.read_changes(None, old.__getitem__, **options)


def assert_exact(payload: Payload, states: list[Pair], **options: int) -> None:
    """Applying the payload to the old bits gives the new ones, and it says of each change where it started."""
    for (segment, old_N, new_N), changes in zip(states, read_all(payload, states, **options), strict=True):
        assert changes.segment == segment
        assert np.array_equal(old_N[changes.positions_K], changes.old_K)
        applied_N = old_N.copy()
        applied_N[changes.positions_K] = changes.new_K
        assert np.array_equal(applied_N, new_N)
        assert changes.num_changed == np.count_nonzero(old_N != new_N)


def renamed(states: list[Pair]) -> list[Pair]:
    """The same bits under names that differ."""
    return [
        (Segment(TensorSpec(f"{n}.{s.tensor.name}", s.tensor.dtype, s.tensor.shape), s.start, s.length), old_N, new_N)
        for n, (s, old_N, new_N) in enumerate(states)
    ]


@pytest.mark.parametrize("coding", CODINGS)
@given(states=st.lists(pairs(), max_size=6))
def test_any_states_of_any_dtypes_come_back(coding: str, states: list[Pair]) -> None:
    states = renamed(states)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "p.safetensors"
        info = write_pairs(path, states, coding)
        payload = open_payload(path)
        assert (payload.kind, payload.coding) == ("delta", coding)
        assert payload.segments == tuple(segment for segment, _, _ in states)
        assert payload.num_changed == info.num_changed == sum(np.count_nonzero(o != n) for _, o, n in states)
        assert info.num_elements == sum(segment.length for segment, _, _ in states)
        assert_exact(payload, states)


@given(states=st.lists(pairs(), max_size=6))
def test_any_anchor_comes_back(states: list[Pair]) -> None:
    states = renamed(states)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "p.safetensors"
        info = write_anchor(path, ((segment, bits_N) for segment, bits_N, _ in states))
        payload = open_payload(path)
        assert (payload.kind, info.kind, info.num_changed) == ("anchor", "anchor", info.num_elements)
        for (segment, bits_N, _), (read_segment, read_N) in zip(states, payload.read_anchor(None), strict=True):
            assert read_segment == segment
            assert read_N.dtype == bits_N.dtype
            assert np.array_equal(read_N, bits_N)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("coding", CODINGS)
def test_real_states_come_back(tmp_path: Path, run: str, coding: str) -> None:
    states = real_pairs(run)
    write_pairs(tmp_path / "p", states, coding)
    assert_exact(open_payload(tmp_path / "p"), states)


@pytest.mark.parametrize("coding", CODINGS)
def test_same_input_gives_same_bytes_on_any_number_of_threads(tmp_path: Path, coding: str) -> None:
    states = renamed(real_pairs(RUNS[0]) * 3)
    infos = [write_pairs(tmp_path / str(n), states, coding, num_threads=n) for n in (1, 1, 3)]
    assert infos[0] == infos[1] == infos[2]
    assert len({(tmp_path / str(n)).read_bytes() for n in (1, 3)}) == 1


@pytest.mark.parametrize("limit", [0, 1000, 1 << 23])
def test_the_hash_is_that_of_the_file_however_much_is_kept(tmp_path: Path, limit: int) -> None:
    path = tmp_path / "p"
    bits_N = random_bits(np.random.default_rng(0), "BF16", TILE + 5000)
    segments = [(whole("a", "BF16", bits_N.size), bits_N), (whole("b", "BF16", 100), bits_N[:100])]
    info = write_anchor(path, segments, echo_nbytes=limit)
    raw = path.read_bytes()
    assert (info.nbytes, info.sha256) == (len(raw), hashlib.sha256(raw).hexdigest())


def test_stock_tools_open_payloads(tmp_path: Path) -> None:
    states = real_pairs(RUNS[0])
    info = write_pairs(tmp_path / "delta", states, "gap")
    write_anchor(tmp_path / "anchor", ((segment, bits_N) for segment, bits_N, _ in states))
    for name in ("delta", "anchor"):
        arrays = safetensors.numpy.load_file(tmp_path / name)
        assert sorted(arrays) == ["chunks", "table"]
        assert {str(array.dtype) for array in arrays.values()} == {"uint8"}
    with safetensors.safe_open(tmp_path / "delta", "numpy") as file:
        assert file.metadata() == {"weightline": "1", "kind": "delta", "coding": "gap"}
    assert info.nbytes == (tmp_path / "delta").stat().st_size


@pytest.mark.parametrize("coding", CODINGS)
def test_a_delta_of_nothing(tmp_path: Path, coding: str) -> None:
    info = write_pairs(tmp_path / "none", [], coding)
    assert (info.num_changed, info.num_elements, info.num_segments) == (0, 0, 0)
    assert list(open_payload(tmp_path / "none").read_changes(None, dict.__getitem__)) == []
    bits_N = np.arange(9, dtype=np.uint16)
    states = [(whole("frozen", "BF16", 9), bits_N, bits_N), (whole("none", "F32", 0), *[np.zeros(0, np.uint32)] * 2)]
    scalar = Segment(TensorSpec("scalar", "I64", ()), 0, 1)
    states.append((scalar, np.array([5], np.uint64), np.array([2**64 - 1], np.uint64)))
    assert write_pairs(tmp_path / "empty", states, coding).num_changed == 1
    assert_exact(open_payload(tmp_path / "empty"), states)


@pytest.mark.parametrize("coding", CODINGS)
def test_only_selected_segments_are_decoded_and_only_their_base_is_asked_for(tmp_path: Path, coding: str) -> None:
    states = renamed(real_pairs(RUNS[0]) + real_pairs(RUNS[1]))
    write_pairs(tmp_path / "p", states, coding)
    for wanted in (states[1::2], states[-1:], states[:1], []):
        names = {segment.tensor.name for segment, _, _ in wanted}
        old = {segment: old_N for segment, old_N, _ in wanted}
        payload = open_payload(tmp_path / "p")
        read = list(payload.read_changes(lambda segment, names=names: segment.tensor.name in names, old.__getitem__))
        assert [changes.segment for changes in read] == [segment for segment, _, _ in wanted]
        for changes, (_, old_N, new_N) in zip(read, wanted, strict=True):
            assert np.array_equal(new_N[changes.positions_K], changes.new_K)
            assert changes.num_changed == np.count_nonzero(old_N != new_N)


def test_only_selected_segments_of_an_anchor_are_decoded(tmp_path: Path) -> None:
    states = renamed(real_pairs(RUNS[0]))
    write_anchor(tmp_path / "p", ((segment, bits_N) for segment, bits_N, _ in states))
    wanted = states[2]
    [(segment, bits_N)] = open_payload(tmp_path / "p").read_anchor(lambda segment: segment == wanted[0])
    assert segment == wanted[0]
    assert np.array_equal(bits_N, wanted[1])


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("dtype", ["BF16", "F8_E4M3"])
def test_segments_of_several_tiles_and_chunks(tmp_path: Path, coding: str, dtype: str) -> None:
    rng = np.random.default_rng(11)
    num_elements = 2 * layout.CHUNK_ELEMENTS + TILE // 2 + 3
    old_N = random_bits(rng, dtype, num_elements)
    new_N = old_N.copy()
    new_N[np.unique(rng.integers(0, num_elements, 60_000))] ^= 1
    new_N[[TILE - 1, TILE, num_elements - 1]] ^= 2
    small_N = random_bits(rng, dtype, 100)
    states = [
        (whole("small", dtype, 100), small_N, small_N ^ 1),
        (whole("large", dtype, num_elements), old_N, new_N),
        (whole("last", dtype, 100), small_N, small_N ^ 1),
    ]
    write_pairs(tmp_path / "p", states, coding)
    payload = open_payload(tmp_path / "p")
    assert len(payload._lines[dtype]) >= 2
    assert_exact(payload, states)
    assert_exact(payload, states, num_threads=3)
    [last] = payload.read_changes(lambda segment: segment.tensor.name == "last", lambda _: small_N)
    assert last.num_changed == 100


def test_anchors_are_read_on_threads(tmp_path: Path) -> None:
    bits_N = np.arange(2 * TILE + 5, dtype=np.uint32).astype(np.uint8)
    write_anchor(tmp_path / "p", [(whole("w", "U8", bits_N.size), bits_N)], num_threads=3)
    [(_, read_N)] = open_payload(tmp_path / "p").read_anchor(None, num_threads=3)
    assert np.array_equal(read_N, bits_N)


def test_more_pieces_than_a_chunk_may_have(tmp_path: Path) -> None:
    bits_N = np.arange(2, dtype=np.uint16)
    states = [(whole(f"layer.{n}", "BF16", 2), bits_N, bits_N[::-1].copy()) for n in range(2500)]
    for coding in CODINGS:
        write_pairs(tmp_path / "p", states, coding)
        payload = open_payload(tmp_path / "p")
        assert [len(chunk.pieces) for chunk in payload._lines["BF16"]] == [1024, 1024, 452]
        assert_exact(payload, states)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("coding", CODINGS)
def test_everything_changed_to_anything(tmp_path: Path, dtype: str, coding: str) -> None:
    rng = np.random.default_rng(12)
    old_N = random_bits(rng, dtype, 5000)
    states = [(whole("w", dtype, 5000), old_N, ~changed(rng, old_N, 0.5))]
    write_pairs(tmp_path / "p", states, coding)
    assert_exact(open_payload(tmp_path / "p"), states)


def test_the_magnitude_coding_wants_ranks(tmp_path: Path) -> None:
    segment, old_N, new_N = real_pairs(RUNS[0])[0]
    with pytest.raises(InputError, match="ranked=True"):
        write_delta(tmp_path / "p", [capture(segment, old_N, new_N)], "gap-by-magnitude")
    with pytest.raises(PayloadError):
        open_payload(tmp_path / "p")


def test_another_base_is_refused_or_gives_other_positions_never_a_crash(tmp_path: Path) -> None:
    segment, old_N, new_N = real_pairs(RUNS[0])[0]
    write_pairs(tmp_path / "p", [(segment, old_N, new_N)], "gap-by-magnitude")
    with pytest.raises(PayloadError, match="another base"):
        list(open_payload(tmp_path / "p").read_changes(None, lambda _: np.full(old_N.size, 0x3F80, np.uint16)))
    with pytest.raises(InputError):
        list(open_payload(tmp_path / "p").read_changes(None, lambda _: old_N[:-1]))


def test_overlapping_segments_are_not_written(tmp_path: Path) -> None:
    tensor = TensorSpec("w", "BF16", (10,))
    bits_N = np.arange(6, dtype=np.uint16)
    parts = [capture(Segment(tensor, start, 6), bits_N, bits_N) for start in (0, 4)]
    with pytest.raises(InputError, match="overlap"):
        write_delta(tmp_path / "p", parts)
    with pytest.raises(PayloadError):
        open_payload(tmp_path / "p")


def test_unknown_codings_are_named(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedFeatureError, match="gap-by-magnitude"):
        write_delta(tmp_path / "p", [], "gap-by-moon")


def test_kinds_are_not_mixed_up(tmp_path: Path) -> None:
    write_delta(tmp_path / "delta", [])
    write_anchor(tmp_path / "anchor", [])
    with pytest.raises(PayloadError, match="not 'anchor'"):
        list(open_payload(tmp_path / "delta").read_anchor(None))
    with pytest.raises(PayloadError, match="not 'delta'"):
        list(open_payload(tmp_path / "anchor").read_changes(None, _no_base))


def _no_base(_: Segment) -> BitsArray:
    raise AssertionError("nobody should ask")


@pytest.mark.parametrize(("run", "coding", "bound"), [
    ("sft-3e-6", "gap", 1.18), ("sft-3e-6", "gap-by-magnitude", 0.88),
    ("grpo-3e-6", "gap", 1.14), ("grpo-3e-6", "gap-by-magnitude", 0.76),
])  # fmt: skip
def test_bytes_per_changed_element(tmp_path: Path, run: str, coding: str, bound: float) -> None:
    """Of a model of 36 such layers: no coding looks for repetitions, and fixed costs no longer count."""
    info = write_pairs(tmp_path / "p", renamed(real_pairs(run) * 36), coding)
    assert info.nbytes / info.num_changed < bound


@pytest.mark.parametrize("run", RUNS)
def test_anchors_are_smaller_than_raw(tmp_path: Path, run: str) -> None:
    info = write_anchor(tmp_path / "p", ((segment, bits_N) for segment, bits_N, _ in real_pairs(run)))
    assert info.nbytes < 0.70 * 2 * info.num_elements


def _ones(names: Iterable[str], shape: tuple[int, ...] = (2,)) -> Iterator[Changes]:
    old_1, new_1 = np.zeros(1, np.uint16), np.ones(1, np.uint16)
    for name in names:
        yield Changes(Segment(TensorSpec(name, "BF16", shape), 0, 2), np.zeros(1, np.int64), old_1, new_1)


def test_a_payload_that_no_reader_opens_is_not_written(tmp_path: Path) -> None:
    """Names without a common prefix make a table larger than readers inflate."""
    names = [f"{number:06d}{'x' * 994}" for number in range(9_000)]
    path = tmp_path / "p"
    assert write_delta(path, _ones(names[:8_000])).num_segments == len(open_payload(path).segments) == 8_000
    with pytest.raises(InputError, match="shorter tensor names"):
        write_delta(path, _ones(names))
    with pytest.raises(PayloadError):
        open_payload(path)


@pytest.mark.parametrize(
    ("name", "shape"),
    [("x" * (1 << 16) + "x", (2,)), ("\ud800", (2,)), ("w", (1,)), ("w", (2,) * 33), ("w", (0, 1 << 70))],
)
def test_a_tensor_that_no_reader_takes_is_not_written(tmp_path: Path, name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError):
        write_delta(tmp_path / "p", _ones([name], shape))
    with pytest.raises(PayloadError):
        open_payload(tmp_path / "p")
