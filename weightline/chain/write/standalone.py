"""Commits versions without a trainer: from a checkpoint folder, from an earlier version, or as the first of a fork.

One process works through a bounded group of tensors at a time; each group is a payload of its own.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from weightline.chain.files.assets import assets_of, base_of_folder, require_base, upload_file, upload_files
from weightline.chain.files.source import FolderSource, VersionSource, WeightSource
from weightline.chain.read.history import Chain
from weightline.chain.replay.diff import tensor_groups
from weightline.chain.replay.fetch import fetch_object, fetching
from weightline.chain.replay.state import HostState, read_state
from weightline.chain.write.commit import check_signing_key, commit_manifest
from weightline.chain.write.draft import Authorship, Draft, uploading
from weightline.codec.capture import capture_tensors
from weightline.codec.coding import coding_named
from weightline.codec.digest import add_digests, digest_change, tensor_digest
from weightline.errors import BaseMismatchError, DigestMismatchError, InputError
from weightline.format.manifest import AssetRef, Manifest, Origin
from weightline.format.write_payload import write_anchor, write_delta
from weightline.store.open import check_writable
from weightline.types import BitsArray, Changes, Segment, whole

DEFAULT_CODING = "gap-by-magnitude"


def commit_folder(
    chain: Chain, folder: Path, *, stage: str = "import", coding: str = DEFAULT_CODING, base: Path | None = None
) -> Manifest:
    """Commit a checkpoint folder as the chain's next version (its first: an anchor).

    InputError for what is no folder, or one whose weights are not whole; BaseMismatchError when its tensors are not the
    chain's. An adapter's folder (peft) brings the digest of its base model, which is at `base` or where the adapter
    says; another one than the chain's is a BaseMismatchError, and one that is not here leaves the version without it. A
    crash leaves orphaned payloads, which gc removes. Repeating commits another, empty, version.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder: name the checkpoint folder that its weights lie in", path=str(folder))
    source = FolderSource(folder)
    check_writable(chain.store)
    tip = chain.tip_version()
    recorded = None if tip is None else chain.manifest(tip).base_model
    base_model = require_base(recorded, base_of_folder(folder, base), chain_url=chain.url)
    assets = upload_files(chain.store, folder, () if tip is None else assets_of(chain, tip))
    kind: Literal["anchor", "delta"] = "anchor" if tip is None else "delta"
    author = Authorship(
        stage=stage, run_id="cli", global_step=0, kind=kind, coding=coding, base_model=base_model, is_milestone=True,
        assets=assets,
    )  # fmt: skip
    return commit_source(chain, source, author)


def commit_revert(chain: Chain, version: int, *, coding: str = DEFAULT_CODING) -> Manifest:
    """Commit a version whose state equals that of `version`, made from the chain alone. History stays linear."""
    tip, wanted = chain.tip(), chain.manifest(version)
    if wanted.version == tip.version:
        raise InputError(f"version {version} is the tip of {chain.url}: there is nothing to revert", version=version)
    with fetching(chain.store) as fetcher:
        author = Authorship(
            stage=wanted.stage, run_id=wanted.run_id, global_step=wanted.global_step, kind="revert", coding=coding,
            reverts_to=version, base_model=tip.base_model, is_milestone=True,
            assets=_carry_assets(chain, version, chain, held=assets_of(chain, tip.version)),
        )  # fmt: skip
        return commit_source(chain, VersionSource(chain, version, fetcher), author)


def commit_fork(source: Chain, version: int, new: Chain) -> Manifest:
    """Start a new chain whose version 0 is another chain's version. InputError when `new` holds versions already."""
    if new.tip_version() is not None:
        raise InputError(f"{new.url} holds versions already: a fork starts an empty chain", chain=new.url)
    wanted = source.manifest(version)
    check_writable(new.store)
    with fetching(source.store) as fetcher:
        origin = Origin(chain=source.url, version=version, commit_id=wanted.commit_id)
        author = Authorship(
            stage=wanted.stage, run_id=wanted.run_id, global_step=wanted.global_step, kind="anchor",
            coding=DEFAULT_CODING, forked_from=origin, base_model=wanted.base_model, is_milestone=True,
            assets=_carry_assets(source, version, new, held=()),
        )  # fmt: skip
        return commit_source(new, VersionSource(source, version, fetcher), author)


def _carry_assets(source: Chain, version: int, new: Chain, *, held: tuple[AssetRef, ...]) -> tuple[AssetRef, ...]:
    """The version's small files, put into `new` where none of its kept versions names them."""
    assets = assets_of(source, version)
    if set(assets) <= set(held):
        return assets
    with tempfile.TemporaryDirectory(prefix="weightline-") as name:
        paths = [fetch_object(source.store, asset, Path(name) / asset.name) for asset in assets]
        return tuple(upload_file(new.store, path, held) for path in paths)


def commit_source(chain: Chain, source: WeightSource, author: Authorship) -> Manifest:
    """Commit the state of a source as the chain's next version (for an anchor: its first).

    DigestMismatchError, and nothing committed, when a revert would not be the state that it goes back to.
    """
    check_signing_key()
    tip = None if author.kind == "anchor" else chain.tip()
    if tip is not None:
        _require_same_tensors(chain, tip, source)
    draft, digests = Draft(0 if tip is None else tip.version + 1), dict[str, int]()
    with (
        tempfile.TemporaryDirectory(prefix="weightline-") as name,
        fetching(chain.store) as fetcher,
        uploading(chain.store) as uploads,
    ):
        for names in tensor_groups(source.specs.values()):
            rank = len(draft.payloads)
            path = Path(name) / f"payload-{rank}.safetensors"
            if tip is None:
                info = write_anchor(path, _anchor_parts(source, names, digests))
            else:
                old = read_state(chain, tip.version, names.__contains__, fetcher)
                changes = _changes_to(source, old, coding_named(author.coding).ranked)
                digests |= _digests_after(old.digests, changes)
                if not changes:
                    continue
                info = write_delta(path, changes, author.coding)
            uploads.start(draft.key(rank), path)
            draft.add(rank, info.nbytes, info.sha256, info.num_changed)
    manifest = draft.manifest(author, source.specs, digests, world_size=max(1, len(draft.payloads)))
    _check_revert(chain, manifest)
    commit_manifest(chain, manifest)
    return manifest


def _anchor_parts(
    source: WeightSource, names: frozenset[str], digests: dict[str, int]
) -> Iterator[tuple[Segment, BitsArray]]:
    """The group's tensors. Enters their digests, those of empty tensors, too."""
    bits = source.read(names)
    for segment in (whole(spec) for name, spec in source.specs.items() if name in names):
        bits_N = bits[segment.tensor.name]
        digests[segment.tensor.name] = tensor_digest(segment, bits_N)
        if segment.length:
            yield segment, bits_N


def _changes_to(source: WeightSource, old: HostState, ranked: bool) -> list[Changes]:
    """What leads from the state of a group of tensors to the source's, in the source's order."""
    specs = [spec for name, spec in source.specs.items() if name in old.specs]
    return list(capture_tensors(specs, old.bits, source.read(old.specs), ranked=ranked))


def _digests_after(before: dict[str, int], changes: list[Changes]) -> dict[str, int]:
    after = dict(before)
    for change in changes:
        name = change.segment.tensor.name
        after[name] = add_digests(after[name], digest_change(change))
    return after


def _require_same_tensors(chain: Chain, tip: Manifest, source: WeightSource) -> None:
    differing = set(tip.specs.items()) ^ set(source.specs.items())
    if differing:
        name = min(name for name, _ in differing)
        there, here = str(tip.specs.get(name)), str(source.specs.get(name))
        raise BaseMismatchError(
            f"{chain.url} holds another model: tensor {name} is {there} there, {here} here",
            tensor=name,
            version=tip.version,
            expected=there,
            actual=here,
        )


def _check_revert(chain: Chain, manifest: Manifest) -> None:
    """A revert that does not lead back exactly is never committed."""
    if manifest.reverts_to is None:
        return
    for name, expected in chain.manifest(manifest.reverts_to).digests.items():
        if manifest.digests[name] != expected:
            raise DigestMismatchError(
                f"tensor {name} would not be that of version {manifest.reverts_to}: run weightline verify",
                what=name, expected=expected, actual=manifest.digests[name],
            )  # fmt: skip
