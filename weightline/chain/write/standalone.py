"""Commits versions without a trainer: from a checkpoint folder, from an earlier version, or as the first of a fork.

One process works through a bounded group of tensors at a time; each group is a payload of its own.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

from weightline.chain.files.assets import assets_of, base_of_folder, require_base, upload_file, upload_files
from weightline.chain.files.source import FolderSource, VersionSource, WeightSource
from weightline.chain.read.history import Chain
from weightline.chain.replay.diff import tensor_groups
from weightline.chain.replay.fetch import fetch_object, fetching
from weightline.chain.replay.state import HostState, read_state
from weightline.chain.write.commit import check_signing_key, commit_manifest
from weightline.chain.write.draft import Authorship, Draft, require_elements, uploading
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


def commit_revert(chain: Chain, version: int, *, coding: str = DEFAULT_CODING) -> Manifest:
    """Commits a new version whose state equals that of `version`. History stays linear.

    InputError when `version` is the tip. A repeated call commits another version without changes.
    """
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
            assets=_carry_assets(source, version, new, held=()),
        )  # fmt: skip
        return commit_source(new, VersionSource(source, version, fetcher), author)


def _carry_assets(source: Chain, version: int, new: Chain, *, held: tuple[AssetRef, ...]) -> tuple[AssetRef, ...]:
    """Returns the version's assets, and uploads those to `new` that `held` lacks."""
    assets = assets_of(source, version)
    if set(assets) <= set(held):
        return assets
    with tempfile.TemporaryDirectory(prefix="weightline-") as scratch:
        paths = [fetch_object(source.store, asset, Path(scratch) / asset.sha256) for asset in assets]
        return tuple(
            upload_file(new.store, path, held, name=asset.name) for path, asset in zip(paths, assets, strict=True)
        )


def commit_source(chain: Chain, source: WeightSource, author: Authorship) -> Manifest:
    """Commits the state of a source as the chain's next version. An anchor is the chain's first.

    DigestMismatchError, before the commit, when the state of a revert differs from the version that it reverts to.
    """
    check_signing_key()
    require_elements(source.specs.values(), "the state")
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
    return commit_manifest(chain, manifest)


def _anchor_parts(
    source: WeightSource, names: frozenset[str], digests: dict[str, int]
) -> Iterator[tuple[Segment, BitsArray]]:
    """Yields the group's tensors, except empty ones. Adds the digests of all of them to `digests`."""
    bits = source.read(names)
    for segment in (whole(spec) for name, spec in source.specs.items() if name in names):
        bits_N = bits[segment.tensor.name]
        digests[segment.tensor.name] = tensor_digest(segment, bits_N)
        if segment.length:
            yield segment, bits_N


def _changes_to(source: WeightSource, old: HostState, ranked: bool) -> list[Changes]:
    """Returns the changes from the state of a group of tensors to the source's, in the source's order."""
    specs = [spec for name, spec in source.specs.items() if name in old.specs]
    return list(capture_tensors(specs, old.bits, source.read(old.specs), ranked=ranked))


def _digests_after(before: Mapping[str, int], changes: list[Changes]) -> dict[str, int]:
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
            f"{chain.url} holds another model: tensor {name} is {there} in the chain, {here} in the new weights",
            tensor=name,
            version=tip.version,
            expected=there,
            actual=here,
        )


def _check_revert(chain: Chain, manifest: Manifest) -> None:
    """Raises DigestMismatchError for a revert whose digests differ from those of the version that it reverts to."""
    if manifest.reverts_to is None:
        return
    for name, expected in chain.manifest(manifest.reverts_to).digests.items():
        if manifest.digests[name] != expected:
            raise DigestMismatchError(
                f"tensor {name} would differ from that of version {manifest.reverts_to}: run weightline verify",
                what=name, expected=expected, actual=manifest.digests[name],
            )  # fmt: skip
