"""A shortcut: an additional delta or anchor of a version, written after its commit. SPEC "Shortcuts".

From another base it is a compacted delta; from nothing it is an anchor. Shortcuts are optional: a reader that ignores
them reaches every version, with more bytes.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from weightline.format import keys
from weightline.format.documents import Count, Label
from weightline.format.manifest import Frozen, Hex128, PayloadRef, parse_wire


class Shortcut(Frozen):
    """Payloads that lead from `base_version` (None: from nothing) to `version`."""

    format: Literal["weightline/1"] = "weightline/1"
    features: Annotated[tuple[Label, ...], Field(strict=False)] = ()
    version: Count
    base_version: Count | None
    commit_id: Hex128
    """The commit_id of the version's manifest. A shortcut to any other commit of the version is invalid."""
    base_commit_id: Hex128 | None
    created_at: Label
    coding: Label
    num_changed: Count
    payload_nbytes: Count
    payloads: Annotated[tuple[PayloadRef, ...], Field(strict=False)]

    @model_validator(mode="after")
    def _leads_forward(self) -> Shortcut:
        if self.base_version is not None and self.base_version >= self.version:
            raise ValueError("base_version must be an earlier version")
        if (self.base_version is None) != (self.base_commit_id is None):
            raise ValueError("base_commit_id goes with base_version")
        if sum(payload.nbytes for payload in self.payloads) != self.payload_nbytes:
            raise ValueError("payload_nbytes is not the sum over the payloads")
        return self

    @property
    def key(self) -> str:
        return keys.shortcut(self.base_version, self.version)

    def to_bytes(self) -> bytes:
        """Returns deterministic UTF-8 JSON."""
        return self.model_dump_json(indent=1).encode()

    @classmethod
    def from_bytes(cls, raw: bytes) -> Shortcut:
        """Parses and validates. ManifestError names the broken rule; UnsupportedFeatureError asks for an upgrade."""
        return parse_wire(cls, raw, "shortcut")
