"""The header of format 2: the immutable JSON object, of a few kilobytes, that defines a version. SPEC "Header".

It names the layout, a list of digests, the small files and the provenance by their sha256, and contains what changed
against the list. `WireHeader` is the JSON as it stands; header.schema.json in this folder is its JSON Schema. All other
code has `HeaderV2`, which is validated.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, TypeAdapter, ValidationError

from weightline.errors import ManifestError
from weightline.format import keys
from weightline.format.documents import MAX_HEADER_NBYTES, Count, Label, Note, parse_json
from weightline.format.manifest import (
    FORMAT_1,
    FORMAT_2,
    MAX_ASSETS,
    AssetName,
    AssetRef,
    Facts,
    Frozen,
    Header,
    Manifest,
    PayloadRef,
    Sha256,
    files_of_one_folder,
    read_document,
    validated,
)
from weightline.format.state_digests import DIGEST_NBYTES
from weightline.format.tensor_layout import MAX_LAYOUT_NBYTES, MAX_TENSORS

#: Bounds that a reader accepts, of one header: entries of `payloads`, changes of digests, metrics.
MAX_PAYLOADS = 1 << 14
MAX_CHANGES = 1 << 12
MAX_METRICS = 256
#: A change takes at most three bytes of index, since MAX_TENSORS is below 2^21.
_MAX_CHANGES_LENGTH = (MAX_CHANGES * (DIGEST_NBYTES + 3) * 4 + 2) // 3

#: The sha256 of a payload in base64, without padding.
PayloadHash = Annotated[str, Field(pattern=r"^[A-Za-z0-9+/]{43}$")]


class ObjectRef(Frozen):
    """A list of assets or a provenance, whose key is made from its sha256."""

    sha256: Sha256
    nbytes: Count


class LayoutRef(Frozen):
    """The layout of the version's tensors."""

    sha256: Sha256
    nbytes: Annotated[int, Field(ge=0, le=MAX_LAYOUT_NBYTES)]
    num_tensors: Annotated[int, Field(ge=0, le=MAX_TENSORS)]


class DigestsRef(Frozen):
    """The list of digests that the version's state starts from, and all changes since that list."""

    sha256: Sha256
    changes: Annotated[str, Field(pattern=r"^[A-Za-z0-9+/]*$", max_length=_MAX_CHANGES_LENGTH)] = ""
    """Base64 without padding of `state_digests.pack_changes`."""


class WireHeader(Facts):
    """The JSON of a header. Field order is the order in the file."""

    format: Literal["weightline/2"] = "weightline/2"
    payloads: Annotated[
        tuple[Annotated[tuple[PayloadHash, Count], Field(strict=False)] | None, ...],
        Field(strict=False, max_length=MAX_PAYLOADS),
    ]
    """By number: sha256 and bytes of the payload, or null where a rank had nothing to write."""
    layout: LayoutRef
    digests: DigestsRef
    root: Sha256
    """The hash over the layout and the digests of all tensors."""
    assets: ObjectRef | None
    """The list of the model's small files; null for a model without any."""
    provenance: ObjectRef | None
    metrics: Annotated[dict[Label, float], Field(max_length=MAX_METRICS)] = Field(default_factory=dict)


class HeaderV2(Header):
    """The header of a version in format 2."""

    format: Literal["weightline/2"] = "weightline/2"
    layout: LayoutRef
    digests: DigestsRef
    root: Sha256
    assets: ObjectRef | None
    provenance: ObjectRef | None

    @property
    def changes(self) -> bytes:
        """Returns the changes of digests since the list that the header names."""
        return _decoded(self.digests.changes)

    @property
    def shared_keys(self) -> tuple[str, ...]:
        """Returns the keys of the objects that the header names beside payloads; not those of the assets themselves."""
        found = [keys.layout(self.layout.sha256), keys.digests(self.digests.sha256)]
        found += [keys.asset(self.assets.sha256)] if self.assets else []
        found += [keys.provenance(self.provenance.sha256)] if self.provenance else []
        return tuple(found)

    def to_bytes(self) -> bytes:
        """Returns deterministic UTF-8 JSON."""
        document = {name: getattr(self, name) for name in WireHeader.model_fields}
        return WireHeader.model_construct(**document | {"payloads": _wire_payloads(self)}).model_dump_json().encode()


def parse_header(raw: bytes) -> Manifest | HeaderV2:
    """Parses and validates the object under the key of a version, of either format.

    ManifestError names the broken rule; UnsupportedFeatureError asks for an upgrade.
    """
    document = read_document(raw, "manifest", (FORMAT_1, FORMAT_2))
    if document["format"] == FORMAT_1:
        return validated(Manifest, document, "manifest")
    if len(raw) > MAX_HEADER_NBYTES:
        raise ManifestError(f"a header of {len(raw)} bytes exceeds {MAX_HEADER_NBYTES}", rule="size")
    wire = validated(WireHeader, document, "header")
    fields: dict[str, Any] = {name: getattr(wire, name) for name in WireHeader.model_fields}
    try:
        _decoded(wire.digests.changes)
        fields["payloads"] = tuple(_payload_refs(wire))
    except ValueError as error:
        raise ManifestError(f"header: {error}", rule="base64") from error
    return validated(HeaderV2, fields, "header")


def encoded(raw: bytes) -> str:
    """Returns the bytes in base64 without padding."""
    return base64.b64encode(raw).decode().rstrip("=")


def _decoded(text: str) -> bytes:
    """Inverts `encoded`. ValueError for any other text."""
    try:
        raw = base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except binascii.Error as error:
        raise ValueError(f"{text[:50]!r} is not base64: {error}") from error
    if encoded(raw) != text:
        raise ValueError(f"{text[:50]!r} is not base64 as it is written here")
    return raw


def _payload_refs(wire: WireHeader) -> Iterable[PayloadRef]:
    for number, entry in enumerate(wire.payloads):
        if entry is not None:
            sha256, nbytes = _decoded(entry[0]).hex(), entry[1]
            key = keys.payload(wire.version, wire.commit_id, number)
            yield PayloadRef.model_construct(key=key, nbytes=nbytes, sha256=sha256, rank=number)


def _wire_payloads(header: Header) -> tuple[tuple[str, int] | None, ...]:
    """Returns the payloads by number. The writer gave each the key that a reader derives."""
    entries: list[tuple[str, int] | None] = []
    for ref in sorted(header.payloads, key=lambda ref: ref.rank):
        if ref.rank < len(entries) or ref.key != keys.payload(header.version, header.commit_id, ref.rank):
            raise ValueError(f"payload {ref.rank} has the key {ref.key}, which no reader derives")
        entries += [None] * (ref.rank - len(entries))
        entries.append((encoded(bytes.fromhex(ref.sha256)), ref.nbytes))
    if len(entries) > MAX_PAYLOADS:
        raise ValueError(f"{len(entries)} payloads, and {MAX_PAYLOADS} are read")
    return tuple(entries)


Parsed = TypeVar("Parsed")


class _ListedAsset(Frozen):
    """An entry of a list of assets, whose key is made from its sha256."""

    name: AssetName
    nbytes: Count
    sha256: Sha256


_ASSETS = TypeAdapter(Annotated[tuple[_ListedAsset, ...], Field(strict=False, max_length=MAX_ASSETS)])
_PROVENANCE = TypeAdapter(dict[Label, Note])


def pack_assets(assets: Sequence[AssetRef]) -> bytes:
    """Returns the bytes of a list of assets, sorted by name, so that the same files give the same list.

    ValueError for an asset whose key is not made from its sha256, since readers derive it.
    """
    for asset in assets:
        if asset.key != keys.asset(asset.sha256):
            raise ValueError(f"the asset {asset.name} has the key {asset.key}, which no reader derives")
    entries = [{"name": a.name, "nbytes": a.nbytes, "sha256": a.sha256} for a in sorted(assets, key=lambda a: a.name)]
    return _packed(entries)


def unpack_assets(raw: bytes) -> tuple[AssetRef, ...]:
    """Parses a list of assets. ManifestError for one that breaks a rule."""
    listed = _parsed(_ASSETS, raw, "assets")
    found = tuple(
        AssetRef.model_construct(key=keys.asset(a.sha256), nbytes=a.nbytes, sha256=a.sha256, name=a.name)
        for a in listed
    )
    try:
        return files_of_one_folder(found)
    except ValueError as error:
        raise ManifestError(f"a list of assets: {error}", rule="assets") from error


def pack_provenance(provenance: Mapping[str, str]) -> bytes:
    """Returns the bytes of a provenance."""
    return _packed(dict(sorted(provenance.items())))


def unpack_provenance(raw: bytes) -> dict[str, str]:
    """Parses a provenance. ManifestError for one that breaks a rule."""
    return _parsed(_PROVENANCE, raw, "provenance")


def ref_to(raw: bytes) -> ObjectRef:
    """Returns the reference to an object of these bytes."""
    return ObjectRef(sha256=hashlib.sha256(raw).hexdigest(), nbytes=len(raw))


def _packed(document: object) -> bytes:
    return json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()


def _parsed(adapter: TypeAdapter[Parsed], raw: bytes, rule: str) -> Parsed:
    try:
        return adapter.validate_python(parse_json(raw))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ManifestError(f"the object of {rule}: {where}: {first['msg']}", rule=rule) from error
    except ValueError as error:
        raise ManifestError(f"the object of {rule} cannot be read: {error}", rule=rule) from error
