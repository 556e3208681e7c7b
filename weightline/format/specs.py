"""How the name, dtype and shape of a tensor are written: in the tables of payloads and in layouts.

    spec = shared suffix_nbytes suffix dtype ndim dim*

Numbers are unsigned LEB128. `shared` is how many bytes of the previous name this one starts with; dtype is an index
into `weightline.dtypes.DTYPES`.
"""

from __future__ import annotations

import zlib

from weightline.codec.varint import NumberReader, put_numbers
from weightline.dtypes import DTYPES
from weightline.errors import PayloadError
from weightline.types import MAX_NAME_NBYTES, MAX_NDIM, TensorSpec, is_shape_in_range

DTYPE_CODES = tuple(DTYPES)
_NUMBERS = {code: number for number, code in enumerate(DTYPE_CODES)}


class SpecWriter:
    """Appends specs to `out`, one after the other."""

    def __init__(self, out: bytearray) -> None:
        self._out = out
        self._previous = b""

    def put(self, spec: TensorSpec) -> None:
        """Appends one spec. UnicodeEncodeError for a name that UTF-8 cannot write."""
        name = spec.name.encode()
        shared = _shared_prefix(self._previous, name)
        put_numbers(self._out, shared, len(name) - shared)
        self._out += name[shared:]
        put_numbers(self._out, _NUMBERS[spec.dtype], len(spec.shape), *spec.shape)
        self._previous = name


class SpecReader:
    """Reads specs from untrusted bytes, one after the other. PayloadError(rule) for one that breaks a rule."""

    def __init__(self, reader: NumberReader) -> None:
        self._reader = reader
        self._name = b""
        self._good_shapes: set[tuple[int, ...]] = set()
        """Shapes that were checked already: most tensors of a model have one of a few."""

    def read(self) -> TensorSpec:
        """Returns the next spec."""
        name = self._read_name()
        dtype = read_dtype(self._reader)
        number = self._reader.number
        ndim = number()
        if ndim > MAX_NDIM:
            raise PayloadError(f"{name!r} has {ndim} dimensions", rule="table-shape")
        shape = (number(),) if ndim == 1 else tuple([number() for _ in range(ndim)])
        if shape not in self._good_shapes:
            if not is_shape_in_range(shape):
                raise PayloadError(f"{name!r} has the shape {shape}", rule="table-shape")
            self._good_shapes.add(shape)
        return TensorSpec(name, dtype, shape)

    def _read_name(self) -> str:
        shared, count = self._reader.number(), self._reader.number()
        if shared > len(self._name) or count > MAX_NAME_NBYTES:
            raise PayloadError("a name shares more bytes than the previous one has, or is too long", rule="table-name")
        self._name = self._name[:shared] + self._reader.take(count)
        try:
            return self._name.decode()
        except UnicodeDecodeError as error:
            raise PayloadError("a tensor's name is not UTF-8", rule="table-name") from error


def read_dtype(reader: NumberReader) -> str:
    """Returns the dtype of the next number. PayloadError for one that this release does not know."""
    code = reader.number()
    if code >= len(DTYPE_CODES):
        raise PayloadError(f"unknown dtype code {code}", rule="table-dtype")
    return DTYPE_CODES[code]


def dtype_number(dtype: str) -> int:
    """Returns the number that stands for a dtype."""
    return _NUMBERS[dtype]


def deflated(raw: bytes) -> bytes:
    """Returns the bytes in raw deflate."""
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    return deflate.compress(raw) + deflate.flush()


def inflated(stream: bytes, max_nbytes: int) -> bytes:
    """Returns the inflated bytes. PayloadError for a broken stream and for one that holds more than `max_nbytes`.

    Inflates at most one byte more than `max_nbytes`.
    """
    inflate = zlib.decompressobj(-15)
    try:
        raw = inflate.decompress(stream, max_nbytes)
    except zlib.error as error:
        raise PayloadError(f"the table does not inflate: {error}", rule="table-deflate") from error
    if not inflate.eof or inflate.unused_data:
        raise PayloadError("the table is truncated, too large, or followed by more bytes", rule="table-deflate")
    return raw


def _shared_prefix(a: bytes, b: bytes) -> int:
    limit = min(len(a), len(b))
    differing = int.from_bytes(a[:limit], "big") ^ int.from_bytes(b[:limit], "big")
    return limit - (differing.bit_length() + 7) // 8
