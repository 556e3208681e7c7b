"""Reads a chain: its tip and its manifests. Manifests are immutable, so each is fetched once.

When this process is configured with trusted keys, a manifest or shortcut without a signature by one of them is refused.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from urllib.parse import unquote, urlsplit

from weightline.errors import (
    ChainEmptyError,
    CorruptError,
    ManifestError,
    NotFoundError,
    SignatureError,
    StorageError,
    TransientStorageError,
    UnsupportedFeatureError,
    VersionNotFoundError,
)
from weightline.format import keys
from weightline.format.documents import MAX_MANIFEST_NBYTES, MAX_NOTE_NBYTES, parse_json
from weightline.format.manifest import AssetRef, Manifest
from weightline.format.signature import (
    SIGNING_KEY_VARIABLE,
    Signature,
    TrustedKeys,
    trusted_from_environment,
)
from weightline.store import Store, open_store

_logger = logging.getLogger(__name__)


class Chain:
    """A chain in its bucket. Reads only; `weightline.chain.write` writes.

    Safe to share between threads: the cache holds immutable manifests and only grows. With `trusted`, a manifest or
    shortcut that none of those keys signed is refused (SignatureError) before it is parsed.
    """

    def __init__(self, store: Store, trusted: TrustedKeys | None = None) -> None:
        self.store = store
        self.trusted = trusted
        self.horizons: dict[str, int] = {}
        """The horizon that each record of it states, by key: records are immutable, so each is fetched once."""
        self.assets: dict[int, tuple[AssetRef, ...]] = {}
        """The assets of versions, as `weightline.chain.files.assets` found them."""
        self._manifests: dict[int, Manifest] = {}

    @property
    def url(self) -> str:
        return self.store.url

    @property
    def name(self) -> str:
        """Returns the last part of the URL, as the chain is called in output."""
        return chain_name(self.url)

    def tip_version(self) -> int | None:
        """Returns the newest committed version; None for an empty chain. Costs one get and one short listing.

        An object that stands alone behind a gap is read, and passed over when it is not the manifest of its version.
        """
        hinted = self._hinted_tip() or 0
        # The version before the hinted one is listed, too, so that in most cases none stands alone.
        versions = self.versions(hinted - 1) if hinted > 1 else ()
        versions = versions or self.versions()
        return versions[-1] if versions else None

    def tip(self) -> Manifest:
        """Returns the manifest of the newest version. ChainEmptyError when there is none."""
        version = self.tip_version()
        if version is None:
            raise ChainEmptyError(f"{self.url} holds no version yet: commit a first one", chain=self.url)
        return self.manifest(version)

    def manifest(self, version: int) -> Manifest:
        """Returns a version's manifest. VersionNotFoundError, or ManifestError for bytes that break the format.

        SignatureError when keys are trusted and the signature is missing, forged or for other bytes.
        """
        try:
            manifest = self._manifests[version] = self.read_manifest(version)
        except NotFoundError as error:
            raise VersionNotFoundError(
                f"{self.url} has no version {version}; its tip is {self.tip_version()}",
                chain=self.url,
                version=version,
            ) from error
        return manifest

    def read_manifest(self, version: int) -> Manifest:
        """Returns a version's manifest and does not keep it: a walk over many versions holds one at a time.

        Raises as `manifest` does, but a plain NotFoundError.
        """
        if version in self._manifests:
            return self._manifests[version]
        manifest = Manifest.from_bytes(self.get_trusted(keys.commit(version)))
        if manifest.version != version:
            raise ManifestError(
                f"{keys.commit(version)} holds the manifest of version {manifest.version}", rule="version-is-key"
            )
        return manifest

    def get_trusted(self, key: str) -> bytes:
        """Returns a manifest's or shortcut's bytes. NotFoundError; ManifestError for an object that is too large.

        SignatureError when no trusted key signed them.
        """
        try:
            raw = self.store.get(key, MAX_MANIFEST_NBYTES)
        except CorruptError as error:
            raise ManifestError(str(error), rule="size") from error
        if self.trusted is not None:
            check_signed(self.store, self.trusted, key, raw)
        return raw

    def manifests(self, first: int = 0, last: int | None = None) -> tuple[Manifest, ...]:
        """Returns the manifests of versions first..last (both included; the tip when last is None), oldest first.

        A version that was collected since it was listed is left out.
        """
        found = (self.manifest_if_kept(version) for version in self.versions(first, last))
        return tuple(manifest for manifest in found if manifest is not None)

    def newest_first(self, last: int | None = None) -> Iterator[Manifest]:
        """Yields the manifests up to `last`, newest first. Each is read when asked for, if it was not collected."""
        for version in reversed(self.versions(last=last)):
            if (manifest := self.manifest_if_kept(version)) is not None:
                yield manifest

    def manifest_if_kept(self, version: int) -> Manifest | None:
        """Returns the manifest of a version that was listed; None when it is behind the horizon and was collected.

        Raises as `manifest` does for any other version that is missing.
        """
        from weightline.chain.read.refs import oldest_kept  # which imports this module

        try:
            return self.manifest(version)
        except VersionNotFoundError:
            if version >= oldest_kept(self):
                raise
            return None

    def versions(self, first: int = 0, last: int | None = None) -> tuple[int, ...]:
        """Returns the committed versions among first..last, oldest first. Costs one listing; no manifest is read."""
        start_after = keys.commit(first - 1) if first > 0 else ""
        found: list[int] = []
        for version in self._committed(start_after):
            if last is not None and version > last:
                return tuple(found)
            found.append(version)
        while found and (start := _start_of_last_run(found)) != first and self._is_stray(start):
            del found[found.index(start) :]
        return tuple(found)

    def _is_stray(self, version: int) -> bool:
        """Returns whether the key of a version, with no version before it, holds no manifest.

        What follows such a key is stray as well. The horizon is a version whatever it holds: the tip is not before it.
        """
        from weightline.chain.read.refs import oldest_kept  # which imports this module

        if version == 0 or version <= oldest_kept(self):
            return False
        try:
            self._manifests[version] = self.read_manifest(version)
        except (ManifestError, NotFoundError):
            return True
        except (SignatureError, UnsupportedFeatureError):
            return False  # its reader is to see this error
        return False

    def _committed(self, start_after: str) -> Iterator[int]:
        for info in self.store.list(keys.COMMITS, start_after):
            version = keys.version_of_commit(info.key)
            if version is not None:
                yield version

    def _hinted_tip(self) -> int | None:
        """Returns a recent tip to start listing from; None without one. The object may be stale, missing or broken."""
        try:
            hint = parse_json(self.store.get(keys.TIP_HINT, MAX_NOTE_NBYTES))
        except (NotFoundError, CorruptError, ValueError):
            return None
        except TransientStorageError:
            raise
        except StorageError as error:
            _logger.debug("%s: the hint cannot be read, listing without it: %s", self.url, error)
            return None
        version = hint.get("version") if isinstance(hint, dict) else None
        return version if isinstance(version, int) and version > 0 else None


def _start_of_last_run(versions: Sequence[int]) -> int:
    """Returns the first of the consecutive numbers at the end."""
    at = len(versions) - 1
    while at > 0 and versions[at - 1] == versions[at] - 1:
        at -= 1
    return versions[at]


def chain_name(url: str) -> str:
    """Returns the last part of a URL: "s3://bucket/chains/my%20model/" -> "my model"."""
    return PurePosixPath(unquote(urlsplit(url).path or url)).name or "chain"


def open_chain(url: str, trusted: TrustedKeys | None = None, patience_seconds: float | None = None) -> Chain:
    """Opens the chain at a bucket URL. Reads nothing yet. `trusted` defaults to the keys that the environment names.

    `patience_seconds`: see `open_store`.
    """
    return Chain(open_store(url, patience_seconds), trusted or trusted_from_environment())


def is_same_chain(a: str, b: str) -> bool:
    """Returns whether two URLs name the same bucket prefix."""
    return a.rstrip("/") == b.rstrip("/")


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
