"""The layout: names, dtypes and shapes of a version's tensors, in one object that all versions share. SPEC "Layout".

    layout = deflate( num_tensors spec* )

The tensors stand in the order of their names' bytes in UTF-8. `weightline.format.specs` says how a spec is written.
The place of a tensor in this order is its *index*, by which digests are stored.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from weightline.codec.varint import NumberReader, put_numbers
from weightline.dtypes import DTYPES
from weightline.errors import InputError, ManifestError, PayloadError
from weightline.format.specs import SpecReader, SpecWriter, deflated, inflated
from weightline.types import TensorSpec

#: Bounds that a reader accepts: tensors, and bytes of the inflated layout.
MAX_TENSORS = 1 << 19
MAX_LAYOUT_NBYTES = 1 << 25

#: Estimated bytes of memory of a tensor, beside its name.
_SPEC_NBYTES = 300


@dataclass(frozen=True, eq=False)
class Layout:
    """The tensors of a version, in the order of their names. Equal for equal tensors, however they were written."""

    specs: tuple[TensorSpec, ...]
    """Use `Layout.of`, which sorts them."""

    @classmethod
    def of(cls, specs: Iterable[TensorSpec]) -> Layout:
        """Returns the layout of these tensors. InputError when two have one name."""
        ordered = tuple(sorted(specs, key=_name_of))
        layout = cls(ordered)
        if len(layout.index) < len(ordered):
            raise InputError("two tensors have one name")
        return layout

    @cached_property
    def index(self) -> Mapping[str, int]:
        """Returns the index of every tensor, by name."""
        return {spec.name: at for at, spec in enumerate(self.specs)}

    @cached_property
    def by_name(self) -> dict[str, TensorSpec]:
        """Returns the specs by name, in the layout's order."""
        return {spec.name: spec for spec in self.specs}

    @cached_property
    def num_elements(self) -> int:
        """Returns the number of elements of all tensors."""
        return sum(number * math.prod(shape) for (_, shape), number in self._kinds.items())

    @cached_property
    def nbytes(self) -> int:
        """Returns the bytes of the whole state, uncoded."""
        return sum(number * math.prod(shape) * DTYPES[dtype].itemsize for (dtype, shape), number in self._kinds.items())

    @cached_property
    def _kinds(self) -> Counter[tuple[str, tuple[int, ...]]]:
        """Returns how many tensors have each dtype and shape: of thousands of tensors there are a few kinds."""
        return Counter((spec.dtype, spec.shape) for spec in self.specs)

    @cached_property
    def packed(self) -> bytes:
        """Returns the object's bytes. InputError for a layout that no reader would accept."""
        out = bytearray()
        put_numbers(out, len(self.specs))
        writer = SpecWriter(out)
        try:
            for spec in self.specs:
                writer.put(spec)
        except UnicodeEncodeError as error:
            raise InputError(f"a tensor's name is no text: {error}") from error
        if len(self.specs) > MAX_TENSORS or len(out) > MAX_LAYOUT_NBYTES:
            raise InputError(
                f"a layout of {len(self.specs)} tensors and {len(out)} bytes is too large: readers accept "
                f"{MAX_TENSORS} tensors and {MAX_LAYOUT_NBYTES} bytes",
                nbytes=len(out),
            )
        return deflated(bytes(out))

    @cached_property
    def sha256(self) -> str:
        """Returns the sha256 of the object's bytes as this release writes them, in hex."""
        return hashlib.sha256(self.packed).hexdigest()

    @cached_property
    def memory_nbytes(self) -> int:
        """Returns about how many bytes of memory the layout takes."""
        return sum(len(spec.name) + _SPEC_NBYTES for spec in self.specs)

    def __len__(self) -> int:
        return len(self.specs)

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Layout) and self.specs == other.specs)

    def __hash__(self) -> int:
        return hash((len(self.specs), self.num_elements))


def unpack_layout(raw: bytes, num_tensors: int) -> Layout:
    """Parses a layout of as many tensors as its header says. ManifestError names the broken rule.

    Checks the numbers before it inflates anything, and inflates at most MAX_LAYOUT_NBYTES.
    """
    if num_tensors > MAX_TENSORS:
        raise ManifestError(f"a layout of {num_tensors} tensors; at most {MAX_TENSORS} are read", rule="layout-count")
    try:
        reader = NumberReader(inflated(raw, MAX_LAYOUT_NBYTES), "layout-number")
        found = reader.number()
        if found != num_tensors:
            raise ManifestError(f"a layout of {found} tensors, its header says {num_tensors}", rule="layout-count")
        specs = _read_specs(SpecReader(reader), num_tensors)
        if reader.rest():
            raise ManifestError("the layout has trailing bytes", rule="layout-trailing")
    except PayloadError as error:
        raise ManifestError(f"a layout: {error}", rule=(error.rule or "").replace("table-", "layout-")) from error
    return Layout(specs)


def _read_specs(reader: SpecReader, num_tensors: int) -> tuple[TensorSpec, ...]:
    specs: list[TensorSpec] = []
    previous: str | None = None
    for _ in range(num_tensors):
        spec = reader.read()
        if previous is not None and spec.name <= previous:
            raise ManifestError(f"tensor {spec.name!r} follows {previous!r} in a layout", rule="layout-order")
        previous = spec.name
        specs.append(spec)
    return tuple(specs)


def _name_of(spec: TensorSpec) -> str:
    # The order of code points is the order of bytes in UTF-8.
    return spec.name
