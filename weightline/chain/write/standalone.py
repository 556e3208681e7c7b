"""Commits versions without a trainer: from a checkpoint folder, or as the first of a fork."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Literal

from weightline.chain.files.assets import assets_of, base_of_folder, carry_assets, require_base, upload_files
from weightline.chain.files.source import FolderSource, Tile, VersionSource, WeightSource
from weightline.chain.read.history import Chain
from weightline.chain.replay.diff import spec_groups
from weightline.chain.replay.fetch import fetching
from weightline.chain.write.commit import check_signing_key
from weightline.chain.write.draft import Authorship, require_elements
from weightline.chain.write.version_writer import VersionWriter
from weightline.codec.coding import coding_named, num_cpus
from weightline.codec.digest import add_digests, format_digest, tensor_digest
from weightline.errors import BaseMismatchError, DigestMismatchError, InputError
from weightline.format.manifest import Manifest, Origin
from weightline.format.write_payload import write_anchor_tiles
from weightline.store.open import check_writable
from weightline.types import TensorSpec, whole

DEFAULT_CODING = "gap-by-magnitude"


def commit_folder(
    chain: Chain, folder: Path, *, stage: str = "import", coding: str = DEFAULT_CODING, base: Path | None = None
) -> Manifest:
    """Commits a checkpoint folder as the chain's next version. The first version of a chain is an anchor.

    InputError when `folder` is no folder, or its weights are incomplete; UnsupportedFeatureError for an unknown coding;
    BaseMismatchError when its tensors are not the chain's. For an adapter's folder (peft) the manifest records the
    digest of its base model, which is read from `base` or from the path in the adapter's configuration:
    BaseMismatchError when it is not the chain's, and no digest is recorded when this host has no such model. A crash
    leaves orphaned payloads, which gc removes. A repeated call commits another version without changes.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder: name a checkpoint folder with weights", path=str(folder))
    coding_named(coding)
    source = FolderSource(folder)
    check_writable(chain.store)
    tip = chain.tip_version()
    recorded = None if tip is None else chain.manifest(tip).base_model
    base_model = require_base(recorded, base_of_folder(folder, base), chain_url=chain.url)
    held = () if tip is None else assets_of(chain, tip)
    assets = upload_files(chain.store, folder, held, weights=source.file_names)
    kind: Literal["anchor", "delta"] = "anchor" if tip is None else "delta"
    author = Authorship(
        stage=stage, run_id="cli", global_step=0, kind=kind, coding=coding, base_model=base_model, is_milestone=True,
        assets=assets,
    )  # fmt: skip
    return commit_source(chain, source, author)


def commit_fork(source: Chain, version: int, new: Chain) -> Manifest:
    """Starts a new chain whose version 0 is another chain's version. InputError when `new` has versions already."""
    if new.tip_version() is not None:
        raise InputError(f"{new.url} has versions already: name an empty chain for a fork", chain=new.url)
    wanted = source.manifest(version)
    check_writable(new.store)
    with fetching(source.store) as fetcher:
        origin = Origin(chain=source.url, version=version, commit_id=wanted.commit_id)
        author = Authorship(
            stage=wanted.stage, run_id=wanted.run_id, global_step=wanted.global_step, kind="anchor",
            coding=DEFAULT_CODING, forked_from=origin, base_model=wanted.base_model, is_milestone=True,
            assets=carry_assets(source, version, new, held=()),
        )  # fmt: skip
        return commit_source(new, VersionSource(source, version, fetcher), author)


def commit_source(chain: Chain, source: WeightSource, author: Authorship) -> Manifest:
    """Commits the state of a source as the chain's next version. An anchor is the chain's first.

    Tensors that are known to have the tip's digests are not compared with it. DigestMismatchError,
    before the commit, when the state of a revert differs from the version that it reverts to.
    """
    check_signing_key()
    require_elements(source.specs.values(), "the state")
    if author.kind == "anchor":
        with VersionWriter(chain, 0) as writer:
            digests = _write_anchors(writer, source)
        return writer.commit(author, source.specs, digests)
    tip = chain.tip_header()
    _require_same_tensors(chain, tip.version, source)
    before = chain.digests(tip.version)
    with VersionWriter(chain, tip.version + 1) as writer:
        old = VersionSource(chain, tip.version, writer.fetcher)
        known = partial(source.known_digests, before=before)
        specs = list(source.specs.values())
        digests = writer.put_deltas(specs, before, known, partial(_pairs, old, source), author.coding)
    require_reverted(chain, author, digests)
    return writer.commit(author, source.specs, digests)


def _write_anchors(writer: VersionWriter, source: WeightSource) -> dict[str, int]:
    """Writes the source's state, and returns the digests of its tensors."""
    digests = dict.fromkeys(source.specs, 0)

    def added(tiles: Iterator[Tile]) -> Iterator[Tile]:
        for tile, bits_N in tiles:
            digests[tile.tensor.name] = add_digests(digests[tile.tensor.name], tensor_digest(tile, bits_N))
            yield tile, bits_N

    for group in spec_groups(source.specs.values()):
        tiles = groupby(added(source.tiles(group)), key=lambda tile: whole(tile[0].tensor))
        writer.put(partial(write_anchor_tiles, segments=tiles, num_threads=num_cpus()))
    return digests


def _pairs(old: VersionSource, new: WeightSource, group: Sequence[TensorSpec]) -> Iterator[tuple[Tile, Tile]]:
    """Yields the old and the new tile of these tensors, which the memory can hold at a time."""
    return zip(old.tiles(group), new.tiles(group), strict=True)


def _require_same_tensors(chain: Chain, tip: int, source: WeightSource) -> None:
    held, given = chain.layout(tip).by_name, source.specs
    differing = set(held.items()) ^ set(given.items())
    if differing:
        name = min(name for name, _ in differing)
        there, here = str(held.get(name)), str(given.get(name))
        raise BaseMismatchError(
            f"{chain.url} holds another model: tensor {name} is {there} in the chain, {here} in the new weights",
            tensor=name,
            version=tip,
            expected=there,
            actual=here,
        )


def require_reverted(chain: Chain, author: Authorship, digests: Mapping[str, int]) -> None:
    """Raises DigestMismatchError for a revert whose digests differ from those of the version that it reverts to."""
    if author.reverts_to is None:
        return
    for name, expected in chain.digests(author.reverts_to).items():
        if digests[name] != expected:
            raise DigestMismatchError(
                f"tensor {name} would differ from that of version {author.reverts_to}: run weightline verify",
                what=name, expected=format_digest(expected), actual=format_digest(digests[name]),
            )  # fmt: skip
