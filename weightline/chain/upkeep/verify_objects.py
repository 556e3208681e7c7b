"""Verification of the objects that headers name: that they are there, and that shared ones hold what they should."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass

from weightline.chain.read.history import Chain
from weightline.chain.replay.fetch import fetching
from weightline.chain.upkeep.verify_replay import Finding, noting
from weightline.errors import NotFoundError
from weightline.format import keys
from weightline.format.header import HeaderV2
from weightline.format.manifest import AssetRef, Header, HeaderV1
from weightline.format.state_digests import DIGEST_NBYTES
from weightline.store import ObjectInfo

#: The rule of a finding about a layout, digests or a provenance.
CONTENTS = "contents"


@dataclass(frozen=True, slots=True)
class NamedObject:
    """An object that a kept version or shortcut needs."""

    nbytes: int
    owner: str
    """The key of the header or shortcut that names it."""


def named_objects(chain: Chain, header: Header, findings: list[Finding]) -> dict[str, NamedObject]:
    """Returns the objects that a header needs, by key. Adds a finding when its list of assets cannot be read."""
    found = {ref.key: ref.nbytes for ref in header.payloads}
    if isinstance(header, HeaderV2):
        found[keys.layout(header.layout.sha256)] = header.layout.nbytes
        found[keys.digests(header.digests.sha256)] = DIGEST_NBYTES * header.layout.num_tensors
        if header.assets is not None:
            found[keys.asset(header.assets.sha256)] = header.assets.nbytes
        if header.provenance is not None:
            found[keys.provenance(header.provenance.sha256)] = header.provenance.nbytes
    found |= {asset.key: asset.nbytes for asset in _assets(chain, header, findings)}
    return {key: NamedObject(nbytes, header.key) for key, nbytes in found.items()}


def _assets(chain: Chain, header: Header, findings: list[Finding]) -> tuple[AssetRef, ...]:
    """Returns the assets that the header itself names."""
    if isinstance(header, HeaderV2) and header.assets is not None:
        known = {finding.subject for finding in findings}
        key = keys.asset(header.assets.sha256)
        # A list that many versions share is one finding. One that is missing is found by the listing of objects.
        with noting(findings if key not in known else [], "assets", key), suppress(NotFoundError):
            return chain.contents.assets(header.assets)
    return header.assets if isinstance(header, HeaderV1) else ()


def object_findings(chain: Chain, objects: Mapping[str, NamedObject]) -> Iterator[Finding]:
    """Compares sizes with a listing; an object that it lacks is asked for, since it may be newer."""
    listed: dict[str, ObjectInfo] = {}
    findings: list[Finding] = []
    for prefix in (keys.PAYLOADS, *keys.SHARED) if objects else ():
        with noting(findings, "objects", prefix):
            listed |= {info.key: info for info in chain.store.list(prefix)}
    yield from findings
    for key, named in objects.items():
        info = listed.get(key) or chain.store.head(key)
        if info is None:
            yield Finding("object-missing", key, f"{named.owner} needs it", named.owner)
        elif info.nbytes != named.nbytes:
            yield Finding(
                "object-size", key, f"has {info.nbytes} bytes, {named.owner} says {named.nbytes}", named.owner
            )


def content_findings(chain: Chain, headers: Iterable[Header]) -> Iterator[Finding]:
    """Yields a finding for each version whose layout, digests or provenance break the format or its root.

    And one for each asset whose bytes differ from its sha256. Each object is read once.
    """
    findings: list[Finding] = []
    with fetching(chain.store, is_cached=False) as fetcher:
        fetched: set[str] = set()
        for header in headers:
            with noting(findings, CONTENTS, header.key):
                chain.digests(header.version)
                chain.provenance(header)
            for asset in _assets(chain, header, findings):
                if asset.key not in fetched:
                    fetched.add(asset.key)
                    with noting(findings, "asset", f"{asset.name} ({asset.key})"):
                        fetcher.fetch(asset)
    yield from findings
