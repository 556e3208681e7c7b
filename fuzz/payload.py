"""Reads fuzzed bytes as a payload: a typed error, or changes that satisfy every guarantee of the reader.

python -m fuzz.payload -max_total_time=60

Seeds are the payloads of the conformance cases. An input is also read as a table and streams, for which the target
writes a valid header, so that the fuzzer does not have to find one.
"""

from __future__ import annotations

import io
import tempfile
from pathlib import Path

import atheris

from fuzz.inputs import conformance_payloads, fuzz

with atheris.instrument_imports(include=["weightline"]):
    from weightline.codec.coding import codings
    from weightline.errors import PayloadError, UnsupportedFeatureError
    from weightline.format.envelope import read_envelope, reserve_header, write_header
    from weightline.format.payload import Payload, open_payload

import numpy as np

from weightline.dtypes import bits_dtype
from weightline.types import BitsArray, Segment

#: Larger segments are opened but not decoded.
_MAX_ELEMENTS = 1 << 16
_KINDS = [("delta", coding) for coding in sorted(codings())] + [("anchor", "ordered-pco")]


def read_everything(path: Path) -> None:
    """Reads a payload. AssertionError if the result breaks a guarantee to the caller."""
    payload = open_payload(path)
    if payload.kind == "anchor":
        for segment, bits_N in payload.read_anchor(is_small):
            assert bits_N.size == segment.length
    else:
        check_changes(payload)


def check_changes(payload: Payload) -> None:
    for changes in payload.read_changes(is_small, zeros):
        assert changes.positions_K.size == changes.old_K.size == changes.new_K.size
        assert (np.diff(changes.positions_K) > 0).all()
        assert (changes.old_K != changes.new_K).all()
        if changes.num_changed:
            assert changes.positions_K[0] >= 0
            assert changes.positions_K[-1] < changes.segment.length


def is_small(segment: Segment) -> bool:
    return segment.length <= _MAX_ELEMENTS


def zeros(segment: Segment) -> BitsArray:
    return np.zeros(segment.length, bits_dtype(segment.tensor.dtype))


def with_header(path: Path, data: bytes) -> None:
    """Writes a payload: the first byte chooses kind and coding, the next two split the rest into chunks and table."""
    kind, coding = _KINDS[data[0] % len(_KINDS)]
    rest = data[3:]
    at = int.from_bytes(data[1:3], "little") % (len(rest) + 1)
    with path.open("wb") as file:
        reserve_header(file)
        file.write(rest)
        write_header(file, {"weightline": "1", "kind": kind, "coding": coding}, at, len(rest) - at)


_FOLDER = tempfile.TemporaryDirectory(prefix="weightline-fuzz-")


def one_input(data: bytes) -> None:
    path = Path(_FOLDER.name) / "payload"
    path.write_bytes(data)
    for prepare in (False, True):
        if prepare:
            if len(data) < 3:
                return
            with_header(path, data)
        try:
            read_everything(path)
        except (PayloadError, UnsupportedFeatureError):
            continue


def seeds() -> list[bytes]:
    """Returns whole payloads, and their chunks and tables in the form that `with_header` takes."""
    found = conformance_payloads()
    return found + [part for part in map(_behind_header, found) if part]


def _behind_header(raw: bytes) -> bytes:
    try:
        envelope = read_envelope(io.BytesIO(raw), len(raw))
        number = _KINDS.index((envelope.metadata.get("kind", ""), envelope.metadata.get("coding", "")))
    except (PayloadError, UnsupportedFeatureError, ValueError):
        return b""
    return (
        bytes([number])
        + (envelope.table_start - envelope.chunks_start).to_bytes(2, "little")
        + raw[envelope.chunks_start :]
    )


if __name__ == "__main__":
    fuzz("payload", one_input, seeds())
