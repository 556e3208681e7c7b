"""Reads versions: their headers, and the layouts, digests, small files and provenances that headers name.

A header has the facts of a version in a few kilobytes. Layouts and digests of tensors, small files and provenances are
objects that versions share, and are read when they are asked for. In format 1 all of it is in one manifest. All of it
is immutable and kept in caches, which are bounded by bytes.

A signed header names everything else by its sha256, so only headers and shortcuts have signatures.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager

from weightline.chain.read.contents import BoundedCache, Contents
from weightline.codec.digest import parse_digest
from weightline.errors import (
    CorruptError,
    ManifestError,
    NotFoundError,
    SignatureError,
    VersionNotFoundError,
)
from weightline.format import keys
from weightline.format.documents import MAX_MANIFEST_NBYTES, MAX_NOTE_NBYTES
from weightline.format.header import HeaderV2, parse_header
from weightline.format.manifest import Header, HeaderV1, Manifest, TensorState
from weightline.format.signature import SIGNING_KEY_VARIABLE, Signature, TrustedKeys
from weightline.format.state_digests import DigestArray, StateDigests, apply_changes, root_of
from weightline.format.tensor_layout import Layout
from weightline.store import Store

#: Bytes of memory of all headers that a chain keeps, and about how many one takes beside its texts.
MAX_HEADERS_NBYTES = 1 << 23
_HEADER_NBYTES = 6144
_PAYLOAD_NBYTES = 1024
_METRIC_NBYTES = 128


class VersionReader(ABC):
    """Reads the versions of a chain by their numbers. `Chain` knows which there are.

    Safe to share between threads. With `trusted`, a header or shortcut that none of those keys signed is refused
    (SignatureError) before it is parsed.
    """

    def __init__(
        self,
        store: Store,
        trusted: TrustedKeys | None = None,
        contents: Contents | None = None,
        *,
        max_headers_nbytes: int = MAX_HEADERS_NBYTES,
    ) -> None:
        """`max_headers_nbytes`: bound of the cache of headers, for an operation that holds all of them anyway."""
        self.store = store
        self.trusted = trusted
        self.contents = contents or Contents(store)
        """The shared objects that headers name."""
        self._headers = BoundedCache(max_headers_nbytes)
        self._newest_layout: Layout | None = None
        """Of the manifest of format 1 that was read last: the next one mostly has an equal layout, and shares it."""

    @abstractmethod
    def tip_version(self) -> int | None:
        """Returns the newest committed version; None for an empty chain."""

    @property
    def url(self) -> str:
        return self.store.url

    def header(self, version: int) -> Header:
        """Returns a version's header. VersionNotFoundError, or ManifestError for bytes that break the format.

        SignatureError when keys are trusted and the signature is missing, forged or for other bytes.
        """
        with self._naming(version):
            return self.read_header(version)

    @contextmanager
    def _naming(self, version: int) -> Iterator[None]:
        """Turns the lack of a version's object into a VersionNotFoundError."""
        try:
            yield
        except NotFoundError as error:
            if error.key != keys.commit(version):
                raise
            raise VersionNotFoundError(
                f"{self.url} has no version {version}; its tip is {self.tip_version()}",
                chain=self.url,
                version=version,
            ) from error

    def read_header(self, version: int) -> Header:
        """Returns a version's header. Raises as `header` does, but a plain NotFoundError."""
        found = self._headers.get(version)
        if isinstance(found, Header):
            return found
        return self._read(version)[0]

    def keep_header(self, header: Header) -> None:
        """Keeps the header of a version that this process has committed."""
        self._headers.put(header.version, header, _header_nbytes(header))

    def layout(self, version: int) -> Layout:
        """Returns the names, dtypes and shapes of a version's tensors. Raises as `header` does.

        ManifestError when the header's counts are not those of the layout.
        """
        header = self.header(version)
        if not isinstance(header, HeaderV2):
            return self._digests_v1(version).layout
        layout = self.contents.layout(header.layout)
        if (layout.num_elements, layout.nbytes) != (header.num_elements, header.full_nbytes):
            raise ManifestError(
                f"version {version} claims {header.num_elements} elements and {header.full_nbytes} bytes, its layout "
                f"has {layout.num_elements} and {layout.nbytes}",
                rule="layout-sums",
            )
        return layout

    def digests(self, version: int) -> StateDigests:
        """Returns the state digest of every tensor after a version, read-only. Raises as `layout` does.

        Costs the header, and at most two objects that versions share: the layout and a list of digests. ManifestError
        when they do not have the root that the header states.
        """
        header = self.header(version)
        if not isinstance(header, HeaderV2):
            return self._digests_v1(version)
        layout = self.layout(version)
        digests_T = self.contents.kept_digests(header.root, len(layout), lambda: self._read_digests(header))
        return StateDigests(layout, digests_T)

    def _read_digests(self, header: HeaderV2) -> DigestArray:
        num_tensors = header.layout.num_tensors
        digests_T = apply_changes(self.contents.digest_list(header.digests.sha256, num_tensors), header.changes)
        root = root_of(header.layout.sha256, digests_T)
        if root != header.root:
            raise ManifestError(
                f"the digests of version {header.version} have the root {root}, its header says {header.root}",
                rule="root",
            )
        return digests_T

    def _digests_v1(self, version: int) -> StateDigests:
        kept = self._headers.get(("digests", version))
        if isinstance(kept, StateDigests):
            return kept
        return self._read(version)[1] or self._digests_v1(version)

    def _read(self, version: int) -> tuple[Header, StateDigests | None]:
        """Reads and keeps a version's header, and the digests that a manifest of format 1 contains."""
        return self._keep(self._parse(version))

    def _keep(self, parsed: Manifest | HeaderV2) -> tuple[Header, StateDigests | None]:
        if isinstance(parsed, HeaderV2):
            self.keep_header(parsed)
            return parsed, None
        digests, header = self._digests_of(parsed), parsed.header
        self.keep_header(header)
        self._headers.put(("digests", header.version), digests, digests.digests_T.nbytes)
        return header, digests

    def _parse(self, version: int) -> Manifest | HeaderV2:
        parsed = parse_header(self.get_trusted(keys.commit(version)))
        if parsed.version != version:
            raise ManifestError(
                f"{keys.commit(version)} holds the manifest of version {parsed.version}", rule="version-is-key"
            )
        return parsed

    def _digests_of(self, manifest: Manifest) -> StateDigests:
        layout = Layout.of(manifest.specs.values())
        layout = self._newest_layout if self._newest_layout == layout else layout
        self._newest_layout = layout
        digests = {name: parse_digest(digest) for name, digest in manifest.digests.items()}
        found = StateDigests.of(layout, digests)
        found.digests_T.setflags(write=False)
        return found

    def manifest(self, version: int) -> Manifest:
        """Returns a version with all that it refers to. Raises as `digests` does.

        Takes time and memory for every tensor: ask for `header`, `layout` or `digests` where one of them is enough.
        """
        kept = self._headers.get(version)
        with self._naming(version):
            parsed = kept if isinstance(kept, HeaderV2) else self._parse(version)
        self._keep(parsed)
        return self._assembled(parsed) if isinstance(parsed, HeaderV2) else parsed

    def provenance(self, header: Header) -> dict[str, str]:
        """Returns the provenance of a version: links for people. Raises as `digests` does."""
        if isinstance(header, HeaderV2):
            return self.contents.provenance(header.provenance) if header.provenance else {}
        return dict(header.provenance) if isinstance(header, HeaderV1 | Manifest) else {}

    def _assembled(self, header: HeaderV2) -> Manifest:
        digests = self.digests(header.version)
        tensors = {
            spec.name: TensorState.model_construct(dtype=spec.dtype, shape=spec.shape, digest=digest)
            for spec, digest in zip(digests.layout.specs, digests.formatted().values(), strict=True)
        }
        facts = {name: getattr(header, name) for name in Header.model_fields}
        return Manifest.model_construct(
            **facts,
            assets=self.contents.assets(header.assets) if header.assets else (),
            tensors=tensors,
            provenance=self.provenance(header),
        )

    def get_trusted(self, key: str) -> bytes:
        """Returns a header's or shortcut's bytes. NotFoundError; ManifestError for an object that is too large.

        SignatureError when no trusted key signed them.
        """
        try:
            raw = self.store.get(key, MAX_MANIFEST_NBYTES)
        except CorruptError as error:
            raise ManifestError(str(error), rule="size") from error
        if self.trusted is not None:
            check_signed(self.store, self.trusted, key, raw)
        return raw


def _header_nbytes(header: Header) -> int:
    """Returns about how many bytes of memory a header takes."""
    nbytes = _HEADER_NBYTES + _PAYLOAD_NBYTES * len(header.payloads) + _METRIC_NBYTES * len(header.metrics)
    if isinstance(header, HeaderV2):
        return nbytes + len(header.digests.changes)
    return nbytes + (_PAYLOAD_NBYTES * len(header.assets) if isinstance(header, HeaderV1) else 0)


def check_signed(store: Store, trusted: TrustedKeys, key: str, body: bytes) -> None:
    """Raises SignatureError unless a trusted key signed exactly these bytes under this key.

    Reads one object per trusted key until one is found.
    """
    digest = hashlib.sha256(body).hexdigest()
    for key_id in trusted.key_ids:
        try:
            raw = store.get(keys.signature(key, digest, key_id), MAX_NOTE_NBYTES)
        except NotFoundError:
            continue
        except CorruptError as error:
            raise SignatureError(f"the signature of {key} cannot be read: {error}", key=key) from error
        trusted.check(_parsed(raw, key), key, body)
        return
    raise SignatureError(
        f"{store.url}: {key} is not signed by a trusted key ({', '.join(trusted.key_ids)}). Set {SIGNING_KEY_VARIABLE} "
        "where this chain is written",
        key=key, key_ids=trusted.key_ids,
    )  # fmt: skip


def _parsed(raw: bytes, key: str) -> Signature:
    try:
        return Signature.from_bytes(raw)
    except CorruptError as error:
        raise SignatureError(f"the signature of {key} cannot be read: {error}", key=key) from error
