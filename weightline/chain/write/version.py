"""Puts what the header of a new version names, and builds the header, in the format in which the chain goes on.

A writer continues a chain in the format of its tip, so that older releases that share the chain go on working. New
chains are in format 2. A chain of format 1 goes on in format 2 once it is marked for it (`mark_upgraded`).

In format 2 a version mostly shares its layout, its list of digests, its list of assets and its provenance with the
version before it, which is kept. Whatever it does not share is put, durably, before the header. A crash leaves objects
that nothing names, which gc removes.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Self

from weightline.chain.files.assets import assets_of
from weightline.chain.read.history import Chain
from weightline.codec.digest import format_digest, parse_digest
from weightline.errors import InputError, ObjectExistsError
from weightline.format import keys
from weightline.format.documents import MAX_LIST_NBYTES
from weightline.format.header import (
    MAX_METRICS,
    DigestsRef,
    HeaderV2,
    LayoutRef,
    ObjectRef,
    encoded,
    pack_assets,
    pack_provenance,
    ref_to,
)
from weightline.format.manifest import (
    FORMAT_1,
    FORMAT_2,
    AssetRef,
    Header,
    HeaderV1,
    Manifest,
    TensorState,
    features_of,
    utc_now,
)
from weightline.format.state_digests import DigestArray, StateDigests, pack_changes, pack_list, root_of
from weightline.format.tensor_layout import Layout
from weightline.store import Store

_logger = logging.getLogger(__name__)

#: The format of new chains. Tests of the older one set it.
NEW_CHAINS = FORMAT_2

#: A writer puts a new list of digests when more tensors than this differ from the list that the tip names, ...
MAX_INLINE_CHANGES = 128
#: ... or when changes and metrics take more bytes of the header than these, and those for each tensor changed last.
MAX_INLINE_NBYTES = 3072
INLINE_NBYTES_OF_TENSOR = 40


@dataclass(frozen=True, slots=True)
class NewVersion:
    """A version that is about to be committed, before it is in any format."""

    facts: Header
    """The facts that are the same in all formats."""
    digests: StateDigests
    assets: tuple[AssetRef, ...] = ()
    """Empty means those of the version before."""
    provenance: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, manifest: Manifest) -> Self:
        """Returns what a manifest says."""
        digests = {name: parse_digest(digest) for name, digest in manifest.digests.items()}
        state = StateDigests.of(Layout.of(manifest.specs.values()), digests)
        return cls(manifest, state, manifest.assets, manifest.provenance)

    def manifest(self) -> Manifest:
        """Returns the version as a manifest of format 1. pydantic's ValidationError for facts that contradict."""
        specs = self.digests.layout.specs
        tensors = {
            spec.name: TensorState(dtype=spec.dtype, shape=spec.shape, digest=format_digest(digest))
            for spec, digest in zip(specs, self.digests.values(), strict=True)
        }
        return Manifest(
            **_facts(self.facts), format=FORMAT_1, features=features_of(specs, self.assets), assets=self.assets,
            tensors=tensors, provenance=dict(self.provenance),
        )  # fmt: skip


def format_of_next(chain: Chain, base: Header | None) -> str:
    """Returns the format in which a writer writes the version after `base` (None: the chain's first)."""
    if base is None:
        return NEW_CHAINS
    if isinstance(base, HeaderV1) and chain.store.head(keys.upgrade(2)) is None:
        return FORMAT_1
    return FORMAT_2


def mark_upgraded(chain: Chain) -> bool:
    """Marks the chain, so that its next version is in format 2. Returns whether anything changes by it.

    Commits nothing. Safe to repeat. ChainEmptyError for a chain without a version.
    """
    if not isinstance(chain.tip_header(), HeaderV1):
        return False
    try:
        chain.store.put_if_absent(keys.upgrade(2), json.dumps({"created_at": utc_now()}).encode())
    except ObjectExistsError:
        return False
    return True


def put_contents(chain: Chain, new: NewVersion, base: Header | None) -> HeaderV2:
    """Puts what `base`, the header of the version before, does not name, and returns the header of format 2.

    Safe to repeat: keys name their content. InputError for what no reader would accept.
    """
    before = base if isinstance(base, HeaderV2) else None
    layout = _put_layout(chain, new.digests.layout, before)
    digests_T = new.digests.digests_T
    facts = _facts(new.facts)
    facts["metrics"] = _metrics(new.facts)
    header = HeaderV2(
        **facts, format=FORMAT_2, features=(), layout=layout, digests=_put_digests(chain, new, layout, before),
        root=root_of(layout.sha256, digests_T), assets=_put_assets(chain, new.assets, base, before),
        provenance=_put_provenance(chain, new.provenance, before),
    )  # fmt: skip
    chain.contents.keep_digests(header.root, digests_T)
    return header


def _facts(header: Header) -> dict[str, Any]:
    return {name: getattr(header, name) for name in Header.model_fields if name not in ("format", "features")}


def _metrics(facts: Header) -> dict[str, float]:
    """Returns as many metrics as a header holds. It logs what it leaves out: a commit does not fail for a number."""
    left_out = list(facts.metrics)[MAX_METRICS:]
    if left_out:
        _logger.warning(
            "version %d has %d metrics, and a header holds %d: %s and those after it are left out",
            facts.version, len(facts.metrics), MAX_METRICS, left_out[0],
        )  # fmt: skip
    return dict(islice(facts.metrics.items(), MAX_METRICS))


def _put_layout(chain: Chain, layout: Layout, before: HeaderV2 | None) -> LayoutRef:
    if before is not None and chain.contents.layout(before.layout) == layout:
        return before.layout
    ref = LayoutRef(sha256=layout.sha256, nbytes=len(layout.packed), num_tensors=len(layout))
    _put(chain.store, keys.layout(layout.sha256), layout.packed)
    chain.contents.keep_layout(layout.sha256, layout)
    return ref


def _put_digests(chain: Chain, new: NewVersion, layout: LayoutRef, before: HeaderV2 | None) -> DigestsRef:
    """Returns the changes against the list that the version before names, or puts a new list."""
    digests_T = new.digests.digests_T
    if before is not None and before.layout == layout:
        listed_T = chain.contents.digest_list(before.digests.sha256, layout.num_tensors)
        changes, num_changes = pack_changes(listed_T, digests_T)
        num_now = int((chain.digests(before.version).digests_T != digests_T).any(axis=1).sum())
        if num_changes <= MAX_INLINE_CHANGES and _fits_inline(changes, new.facts.metrics, num_now):
            return DigestsRef(sha256=before.digests.sha256, changes=encoded(changes))
    return _put_list(chain, digests_T)


def _fits_inline(changes: bytes, metrics: Mapping[str, float], num_changed_tensors: int) -> bool:
    nbytes = len(encoded(changes)) + len(json.dumps(dict(metrics)))
    return nbytes <= MAX_INLINE_NBYTES + INLINE_NBYTES_OF_TENSOR * num_changed_tensors


def _put_list(chain: Chain, digests_T: DigestArray) -> DigestsRef:
    raw = pack_list(digests_T)
    ref = DigestsRef(sha256=ref_to(raw).sha256)
    _put(chain.store, keys.digests(ref.sha256), raw)
    chain.contents.keep_digests(ref.sha256, digests_T)
    return ref


def _put_assets(
    chain: Chain, assets: tuple[AssetRef, ...], base: Header | None, before: HeaderV2 | None
) -> ObjectRef | None:
    """Returns the list of these assets; without any, that of the version before."""
    if not assets and before is not None:
        return before.assets
    named = assets or (() if base is None else assets_of(chain, base.version))
    if not named:
        return None
    raw = pack_assets(named)
    ref = ref_to(raw)
    if before is None or before.assets != ref:
        _put(chain.store, keys.asset(ref.sha256), raw)
        chain.contents.keep_assets(ref, raw)
    return ref


def _put_provenance(chain: Chain, provenance: Mapping[str, str], before: HeaderV2 | None) -> ObjectRef | None:
    if not provenance:
        return None
    raw = pack_provenance(provenance)
    if len(raw) > MAX_LIST_NBYTES:
        raise InputError(f"a provenance of {len(raw)} bytes; {MAX_LIST_NBYTES} are read", field="provenance")
    ref = ref_to(raw)
    if before is None or before.provenance != ref:
        _put(chain.store, keys.provenance(ref.sha256), raw)
        chain.contents.keep_provenance(ref, raw)
    return ref


def _put(store: Store, key: str, body: bytes) -> None:
    """Puts an object whose key names its content; it is durable when this returns.

    An object that exists is put again, which renews its age: gc could otherwise delete it before the commit.
    """
    with tempfile.TemporaryDirectory(prefix="weightline-") as folder:
        path = Path(folder) / "object"
        path.write_bytes(body)
        store.put_file(key, path)
