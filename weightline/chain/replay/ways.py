"""The hops that a bucket offers: each version's own payloads, shortcuts, and deltas walked backwards."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from weightline.chain.read.history import Chain
from weightline.chain.read.horizon import oldest_kept
from weightline.chain.replay.plan import Hop, ReplayPlan, plan_replay
from weightline.errors import ManifestError, NotFoundError, SignatureError
from weightline.format import keys
from weightline.format.manifest import Manifest
from weightline.format.shortcut import Shortcut

#: Codings whose positions can be decoded without the base, so that a delta can be walked backwards.
REVERSIBLE_CODINGS = frozenset({"gap"})


class Ways:
    """What leads into each version. Shortcuts are listed once, when made; manifests are read when asked for."""

    def __init__(self, chain: Chain, *, backward_below: int | None = None) -> None:
        """backward_below: also offer deltas walked backwards, into versions below this one."""
        self._chain = chain
        self._horizon = oldest_kept(chain)
        self._backward_below = backward_below
        self.refused: dict[str, SignatureError] = {}
        """Shortcuts that were passed over since no trusted key signed them."""
        self._shortcut_keys: dict[int, list[str]] = defaultdict(list)
        for info in chain.store.list(keys.SHORTCUTS):
            if ends := keys.ends_of_shortcut(info.key):
                self._shortcut_keys[ends[1]].append(info.key)

    def __call__(self, version: int) -> Iterator[Hop]:
        if self._is_gone(version):
            return
        manifest = self._chain.manifest(version)
        yield hop_of(manifest)
        for shortcut in self.shortcuts_into(version):
            if shortcut.commit_id == manifest.commit_id and self._base_stands(shortcut):
                yield hop_of_shortcut(shortcut)
        if self._backward_below is not None and version < self._backward_below and not self._is_gone(version + 1):
            above = self._chain.manifest(version + 1)
            if above.base_version == version and above.coding in REVERSIBLE_CODINGS:
                yield Hop(version, above.version, above.payloads, above.num_changed, is_backward=True)

    def shortcuts_into(self, version: int) -> Iterator[Shortcut]:
        """The version's shortcuts, without those that vanished meanwhile, or that no trusted key signed."""
        for key in self._shortcut_keys.get(version, ()):
            try:
                shortcut = Shortcut.from_bytes(self._chain.get_trusted(key))
            except NotFoundError:
                continue
            except SignatureError as error:
                self.refused[key] = error
                continue
            if shortcut.key != key:
                raise ManifestError(f"{key} holds the shortcut {shortcut.key}", rule="shortcut-is-key")
            yield shortcut

    def _is_gone(self, version: int) -> bool:
        """Behind the horizon, ask the bucket and not the cache: gc may have been there. Payloads go after manifests."""
        return version < self._horizon and self._chain.store.head(keys.commit(version)) is None

    def _base_stands(self, shortcut: Shortcut) -> bool:
        """A base that is expired or replaced makes the shortcut useless, never wrong."""
        if shortcut.base_version is None:
            return True
        if self._is_gone(shortcut.base_version):
            return False
        return self._chain.manifest(shortcut.base_version).commit_id == shortcut.base_commit_id


def hop_of(manifest: Manifest) -> Hop:
    """The version's own payloads as a hop."""
    return Hop(manifest.base_version, manifest.version, manifest.payloads, manifest.num_changed)


def hop_of_shortcut(shortcut: Shortcut) -> Hop:
    """The shortcut as a hop."""
    return Hop(
        shortcut.base_version, shortcut.version, shortcut.payloads, shortcut.num_changed, is_shortcut=True
    )  # fmt: skip


def plan_between(chain: Chain, have: int | None, want: int) -> ReplayPlan:
    """The cheapest way through the bucket as it stands. Reads manifests near the way, and no payload."""
    chain.manifest(want)
    ways = Ways(chain, backward_below=have if have is not None and have > want else None)
    return plan_replay(ways, have, want)
