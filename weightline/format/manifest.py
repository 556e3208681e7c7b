"""The manifest of format 1: the immutable JSON object that defines a version. SPEC "Manifest of format 1".

Only this module and `weightline.format.header` parse bytes into frozen, validated objects; all other code relies on the
validation. `Header` is what both formats say of a version besides its tensors.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import PurePosixPath
from typing import Annotated, Final, Literal, Self, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from weightline.dtypes import DTYPES, MX_CODES
from weightline.errors import (
    InputError,
    ManifestError,
    UnsupportedFeatureError,
)
from weightline.format import keys
from weightline.format.documents import MAX_MANIFEST_NBYTES, Count, Label, Note, parse_json
from weightline.types import MAX_ELEMENTS, MAX_NAME_NBYTES, MAX_NDIM, TensorSpec, is_shape_in_range

FORMAT_1: Final = "weightline/1"
FORMAT_2: Final = "weightline/2"

#: Features of the format that this release reads. A manifest that names any other feature is refused.
#: `asset-paths`: an asset's name is a path, or a name that release 0.1 did not know. `mx-dtypes`: F8_E8M0 or F4.
ASSET_PATHS, MX_DTYPES = "asset-paths", "mx-dtypes"
KNOWN_FEATURES = frozenset({ASSET_PATHS, MX_DTYPES})

MAX_ASSETS = 4096

#: Names of assets and dtypes that release 0.1 does not refuse.
_FIRST_ASSET_NAMES = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def _known_dtype(dtype: str) -> str:
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}")
    return dtype


def _key_inside_chain(key: str) -> str:
    if key.startswith("/") or "\\" in key or any(part in ("", ".", "..") for part in key.split("/")):
        raise ValueError(f"key {key!r} leaves the chain")
    return key


def _path_inside_folder(name: str) -> str:
    try:
        return keys.checked_path(name)
    except InputError as error:
        raise ValueError(str(error)) from error


def files_of_one_folder(assets: tuple[AssetRef, ...]) -> tuple[AssetRef, ...]:
    """No two assets have one path, and none is a folder in the path of another."""
    names = [asset.name for asset in assets]
    folders = {str(parent) for name in names for parent in PurePosixPath(name).parents}
    if len(set(names)) < len(names) or not folders.isdisjoint(names):
        raise ValueError("two assets have one path")
    return assets


def _shape_in_range(shape: tuple[int, ...]) -> tuple[int, ...]:
    if not is_shape_in_range(shape):
        raise ValueError(f"more than {MAX_NDIM} dimensions or {MAX_ELEMENTS} elements")
    return shape


def _finite_only(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


TensorName = Annotated[str, Field(max_length=MAX_NAME_NBYTES)]


Hex128 = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]


Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


AssetName = Annotated[str, AfterValidator(_path_inside_folder)]


Key = Annotated[str, Field(min_length=1, max_length=1024), AfterValidator(_key_inside_chain)]


class Frozen(BaseModel):
    """Base class of stored objects: unknown fields are refused, and types are checked strictly."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


Wire = TypeVar("Wire", bound=Frozen)


class StoredObject(Frozen):
    """An object that a manifest refers to, with the size and hash by which a reader checks it."""

    key: Key
    nbytes: Count
    sha256: Sha256


class PayloadRef(StoredObject):
    """One rank's payload."""

    rank: Count


class AssetRef(StoredObject):
    """A small file of the model's folder: config.json, tokenizer.json, additional_chat_templates/tool_use.jinja."""

    name: AssetName
    """Its path below the folder."""


class TensorState(Frozen):
    """A tensor and the digest of its bits after this version."""

    dtype: Annotated[str, AfterValidator(_known_dtype)]
    shape: Annotated[tuple[Count, ...], Field(strict=False), AfterValidator(_shape_in_range)]
    digest: Hex128


class Origin(Frozen):
    """The version of another chain whose state this one starts from."""

    chain: Note
    version: Count
    commit_id: Hex128


class AdapterBase(Frozen):
    """The frozen model that an adapter's versions belong to. It is identified by its bits, not by its name."""

    name_or_path: Note
    """The name or path that the writer used. Informative only."""
    digest: Sha256
    """One hash over the state digests of its tensors; SPEC "Adapters"."""
    num_elements: Count

    @classmethod
    def of(cls, name_or_path: str, digests: Mapping[str, str], num_elements: int) -> AdapterBase:
        """Builds it from the state digest of each of the base's tensors, by the names of its own checkpoint."""
        text = json.dumps(sorted(digests.items()), separators=(",", ":"))
        digest = hashlib.sha256(text.encode()).hexdigest()
        return cls(name_or_path=name_or_path, digest=digest, num_elements=num_elements)


class Facts(Frozen):
    """The fields that manifests and headers spell alike. Field order is the order in the file."""

    format: str
    features: Annotated[tuple[Label, ...], Field(strict=False)] = ()
    version: Count
    base_version: Count | None
    """The version that this one is a delta against; None for an anchor."""
    kind: Literal["anchor", "delta", "revert"]
    """A revert is a delta whose resulting state equals that of `reverts_to`."""
    reverts_to: Count | None = None
    forked_from: Origin | None = None
    base_model: AdapterBase | None = None
    """Set when the tensors are an adapter's: the model that they belong to. The same in all later versions."""
    commit_id: Hex128
    """Random id of the attempt to commit. It distinguishes a lost reply from a lost race."""
    created_at: Label
    """UTC time by the writer's clock, ISO 8601. Informative only, never used for ordering."""
    run_id: Label
    stage: Label
    global_step: Count
    is_milestone: bool = False
    """True for the first version and the last of a stage, which are always evaluated."""
    coding: Label
    world_size: Annotated[Count, Field(ge=1)]
    num_changed: Count
    num_elements: Count
    payload_nbytes: Count
    full_nbytes: Count
    """Bytes of the whole state, uncoded."""


class Header(Facts):
    """The facts of one committed version but its tensors, small files and provenance."""

    payloads: Annotated[tuple[PayloadRef, ...], Field(strict=False)]
    metrics: Annotated[dict[Label, float], AfterValidator(_finite_only)] = Field(default_factory=dict)
    """Numbers that the trainer logged at this step: loss, reward, ... Numbers that are not finite are left out."""

    @model_validator(mode="after")
    def _facts_agree(self) -> Self:
        if (self.kind == "anchor") != (self.base_version is None):
            raise ValueError("an anchor has no base_version, a delta or revert has one")
        if self.base_version is not None and self.base_version != self.version - 1:
            raise ValueError("base_version must be version - 1")
        if (self.kind == "revert") != (self.reverts_to is not None):
            raise ValueError("reverts_to goes with kind revert")
        if self.reverts_to is not None and self.reverts_to >= self.version:
            raise ValueError("reverts_to must be an earlier version")
        if sum(payload.nbytes for payload in self.payloads) != self.payload_nbytes:
            raise ValueError("payload_nbytes is not the sum over the payloads")
        if self.num_changed > self.num_elements:
            raise ValueError("num_changed exceeds num_elements")
        return self

    @property
    def key(self) -> str:
        return keys.commit(self.version)


class HeaderV1(Header):
    """The header of a version in format 1: its manifest without the tensors."""

    format: Literal["weightline/1"] = "weightline/1"
    assets: tuple[AssetRef, ...]
    """The small files of the model. Empty means those of the version before."""
    provenance: dict[Label, Note]


class Manifest(Header):
    """One committed version with all that its header refers to: its tensors and their digests, and its small files.

    It is what an object of format 1 holds, and what `Chain.manifest` returns for a version of any format. To build one
    takes time and memory for every tensor; `Chain.header` and `Chain.digests` do without it.
    """

    format: Literal["weightline/1", "weightline/2"] = "weightline/1"
    assets: Annotated[
        tuple[AssetRef, ...], Field(strict=False, max_length=MAX_ASSETS), AfterValidator(files_of_one_folder)
    ] = ()
    """The small files of the model. In format 1, empty means those of the version before."""
    tensors: dict[TensorName, TensorState]
    provenance: dict[Label, Note] = Field(default_factory=dict)
    """Links for people: flow_run_id, host, library versions."""

    @model_validator(mode="after")
    def _tensors_add_up(self) -> Manifest:
        specs = self.specs.values()
        if sum(spec.num_elements for spec in specs) != self.num_elements:
            raise ValueError("num_elements is not the sum over the tensors")
        if sum(spec.nbytes for spec in specs) != self.full_nbytes:
            raise ValueError("full_nbytes is not the sum over the tensors")
        return self

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """Returns the tensors' specs, by name."""
        return {name: TensorSpec(name, t.dtype, t.shape) for name, t in self.tensors.items()}

    @property
    def digests(self) -> dict[str, str]:
        """Returns the state digest of every tensor after this version, by name."""
        return {name: tensor.digest for name, tensor in self.tensors.items()}

    @property
    def header(self) -> HeaderV1:
        """Returns the manifest without its tensors."""
        return HeaderV1.model_construct(**{name: getattr(self, name) for name in HeaderV1.model_fields})

    def to_bytes(self) -> bytes:
        """Returns the object of format 1: deterministic UTF-8 JSON. A manifest of a later format is converted."""
        manifest = self
        if self.format != FORMAT_1:
            features = features_of(self.specs.values(), self.assets)
            manifest = self.model_copy(update={"format": FORMAT_1, "features": features})
        return manifest.model_dump_json(indent=1).encode()

    @classmethod
    def from_bytes(cls, raw: bytes) -> Manifest:
        """Parses and validates an object of format 1.

        ManifestError names the broken rule; UnsupportedFeatureError for another format or an unknown feature.
        """
        return parse_wire(cls, raw, "manifest")


def features_of(specs: Iterable[TensorSpec], assets: Iterable[AssetRef]) -> tuple[str, ...]:
    """Returns the features that a manifest with these tensors and assets announces, for older readers."""
    has_paths = any(not _FIRST_ASSET_NAMES.fullmatch(asset.name) for asset in assets)
    has_mx = any(spec.dtype in MX_CODES for spec in specs)
    return (*([ASSET_PATHS] if has_paths else []), *([MX_DTYPES] if has_mx else []))


def parse_wire(cls: type[Wire], raw: bytes, noun: str) -> Wire:
    """Parses a stored object of format 1.

    ManifestError names the broken rule; UnsupportedFeatureError asks for an upgrade.
    """
    return validated(cls, read_document(raw, noun, (FORMAT_1,)), noun)


def read_document(raw: bytes, noun: str, formats: Sequence[str]) -> Mapping[str, object]:
    """Returns the JSON object of one of these formats. Raises as `parse_wire` does."""
    if len(raw) > MAX_MANIFEST_NBYTES:
        raise ManifestError(f"a {noun} of {len(raw)} bytes exceeds {MAX_MANIFEST_NBYTES}", rule="size")
    try:
        document = parse_json(raw)
    except ValueError as error:
        raise ManifestError(f"a {noun} is not JSON that can be read: {error}", rule="json") from error
    return _known(document, noun, formats)


def validated(cls: type[Wire], document: Mapping[str, object], noun: str) -> Wire:
    """Returns the document as an object. ManifestError names the field that breaks a rule."""
    try:
        return cls.model_validate(document)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"]) or noun
        raise ManifestError(f"{noun} field {field}: {first['msg']}", rule=field) from error


def _known(document: object, noun: str, formats: Sequence[str]) -> Mapping[str, object]:
    """Raises UnsupportedFeatureError for objects of newer releases, before the schema would call them broken."""
    if not isinstance(document, Mapping):
        raise ManifestError(f"a {noun} is not a JSON object", rule="json")
    written_as = document.get("format")
    if written_as not in formats:
        if isinstance(written_as, str) and written_as.startswith("weightline/"):
            raise UnsupportedFeatureError(
                f"this release reads {' and '.join(formats)}, not {written_as}: upgrade weightline", feature=written_as
            )
        raise ManifestError(f"the object is not a weightline {noun} (format {written_as!r})", rule="format")
    features = document.get("features", [])
    names = [name for name in features if isinstance(name, str)] if isinstance(features, list) else []
    unknown = [name for name in names if name not in KNOWN_FEATURES]
    if unknown:
        raise UnsupportedFeatureError(
            f"the {noun} needs {unknown[0]!r}, which this release does not support: upgrade weightline",
            feature=unknown[0],
        )
    return document


def utc_now() -> str:
    """Returns the UTC time of this host's clock, in ISO 8601 to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def parse_time(stamp: str | None) -> datetime | None:
    """Returns an ISO 8601 time as a moment, in UTC where it names no zone. None for a text that is not a time."""
    try:
        moment = datetime.fromisoformat(stamp or "")
    except ValueError:
        return None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
