"""A chain: which versions there are, and the newest one. `weightline.chain.read.version_reader` reads each of them.

When this process is configured with trusted keys, a header or shortcut without a signature by one of them is refused.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import PurePosixPath
from urllib.parse import unquote, urlsplit

from weightline.chain.read.contents import Contents
from weightline.chain.read.version_reader import MAX_HEADERS_NBYTES, VersionReader
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
from weightline.format.documents import MAX_NOTE_NBYTES, parse_json
from weightline.format.manifest import AssetRef, Header, Manifest
from weightline.format.signature import (
    TrustedKeys,
    trusted_from_environment,
)
from weightline.store import Store, open_store

_logger = logging.getLogger(__name__)


class Chain(VersionReader):
    """A chain in its bucket. Reads only; `weightline.chain.write` writes.

    Safe to share between threads: the caches hold immutable objects and are bounded by bytes. With `trusted`, a header
    or shortcut that none of those keys signed is refused (SignatureError) before it is parsed.
    """

    def __init__(
        self,
        store: Store,
        trusted: TrustedKeys | None = None,
        contents: Contents | None = None,
        *,
        max_headers_nbytes: int = MAX_HEADERS_NBYTES,
    ) -> None:
        super().__init__(store, trusted, contents, max_headers_nbytes=max_headers_nbytes)
        self.horizons: dict[str, int] = {}
        """The horizon that each record of it states, by key: records are immutable, so each is fetched once."""
        self.assets: dict[int, tuple[AssetRef, ...]] = {}
        """The assets of versions in format 1, as `weightline.chain.files.assets` found them."""

    def reopened(self) -> Chain:
        """Returns the same chain without any header in its cache: it reads what the bucket holds now."""
        return Chain(self.store, self.trusted, self.contents)

    @property
    def name(self) -> str:
        """Returns the last part of the URL, as the chain is called in output."""
        return chain_name(self.url)

    def tip_version(self) -> int | None:
        """Returns the newest committed version; None for an empty chain. Costs one get and one short listing.

        An object that stands alone behind a gap is read, and passed over when it is not the manifest of its version.
        """
        versions = self._from_hint(2)
        return versions[0] if versions else None

    def newest_versions(self, count: int) -> tuple[int, ...]:
        """Returns the newest `count` versions, newest first; fewer where there are no more. Costs as `tip_version`."""
        found = self._from_hint(count)
        return found[:count] if len(found) >= count or 0 in found else self.versions()[::-1][:count]

    def num_versions(self, tip: int) -> int:
        """Returns the number of versions up to the tip.

        From the horizon on they are contiguous, so that only those before it are listed.
        """
        from weightline.chain.read.refs import oldest_kept  # which imports this module

        horizon = oldest_kept(self)
        return max(0, tip - horizon + 1) + (len(self.versions(0, horizon - 1)) if horizon else 0)

    def _from_hint(self, count: int) -> tuple[int, ...]:
        """Returns the versions from `count` before the hinted tip on, newest first; all without a hint that helps."""
        hinted = self._hinted_tip() or 0
        # The version before the hinted one is listed, too, so that in most cases none stands alone.
        versions = self.versions(hinted - count + 1) if hinted >= count else ()
        return (versions or self.versions())[::-1]

    def tip(self) -> Manifest:
        """Returns the manifest of the newest version. ChainEmptyError when there is none."""
        return self.manifest(self.tip_header().version)

    def tip_header(self) -> Header:
        """Returns the header of the newest version. ChainEmptyError when there is none."""
        version = self.tip_version()
        if version is None:
            raise ChainEmptyError(f"{self.url} holds no version yet: commit a first one", chain=self.url)
        return self.header(version)

    def headers(self, first: int = 0, last: int | None = None) -> Iterator[Header]:
        """Yields the headers of versions first..last (both included; the tip when last is None), oldest first.

        The versions are listed at once, and each header is read when asked for. A version that was collected since it
        was listed is left out.
        """
        return self._kept_headers(self.versions(first, last))

    def headers_newest_first(self, last: int | None = None) -> Iterator[Header]:
        """Yields the headers of versions up to `last`, newest first, as `headers` does."""
        return self._kept_headers(self.versions(last=last)[::-1])

    def _kept_headers(self, versions: Iterable[int]) -> Iterator[Header]:
        for version in versions:
            if (header := self.header_if_kept(version)) is not None:
                yield header

    def manifests(self, first: int = 0, last: int | None = None) -> tuple[Manifest, ...]:
        """Returns the manifests of versions first..last (both included; the tip when last is None), oldest first.

        A version that was collected since it was listed is left out.
        """
        return tuple(self.manifest(header.version) for header in self.headers(first, last))

    def newest_first(self, last: int | None = None) -> Iterator[Manifest]:
        """Yields the manifests up to `last`, newest first. Each is read when asked for, if it was not collected."""
        return (self.manifest(header.version) for header in self.headers_newest_first(last))

    def header_if_kept(self, version: int) -> Header | None:
        """Returns the header of a version that was listed; None when it is behind the horizon and was collected.

        Raises as `header` does for any other version that is missing.
        """
        from weightline.chain.read.refs import oldest_kept  # which imports this module

        try:
            return self.header(version)
        except VersionNotFoundError:
            if version >= oldest_kept(self):
                raise
            return None

    def versions(self, first: int = 0, last: int | None = None) -> tuple[int, ...]:
        """Returns the committed versions among first..last, oldest first. Costs one listing; no header is read."""
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
            self.read_header(version)
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
