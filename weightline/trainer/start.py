"""Compares the loaded weights with the chain before the first training step, and plans the first commit.

There are three cases: the chain is empty (commit an anchor), the loaded weights equal the tip (continue), or a resumed
checkpoint is behind or beside the tip (commit a revert, or a delta that leads to it). All others raise
BaseMismatchError.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from weightline.chain.files.assets import assets_of, require_base
from weightline.chain.files.checkpoint import VersionMark
from weightline.chain.read.history import Chain
from weightline.chain.replay.diff import tensor_groups
from weightline.chain.replay.fetch import fetching
from weightline.chain.replay.state import read_state
from weightline.chain.write.commit import check_signing_key
from weightline.chain.write.draft import require_elements
from weightline.codec.capture import capture_all
from weightline.codec.digest import digest_to_limbs, format_digest, limbs_to_digest, tensor_digest
from weightline.codec.torch_ops import bits_of
from weightline.dtypes import DTYPES
from weightline.errors import BaseMismatchError, NotFoundError
from weightline.format.header import HeaderV2
from weightline.format.manifest import AdapterBase, AssetRef, Header
from weightline.format.state_digests import StateDigests
from weightline.format.tensor_layout import Layout
from weightline.naming import CheckpointTensor, checkpoint_tensors
from weightline.store.open import check_writable
from weightline.trainer.adapter import adapter_names, adapter_parts, base_model_of, is_peft_model
from weightline.trainer.baseline import Baseline
from weightline.trainer.earlier import Trail
from weightline.trainer.group import RankGroup
from weightline.trainer.located import LocatedTensors
from weightline.trainer.model_files import upload_assets
from weightline.trainer.partition import Shard, refuse_fsdp1, shards_of
from weightline.trainer.published_dtype import DtypeRule, kept_as_held, narrowed, published
from weightline.trainer.settings import PublishSettings
from weightline.types import Changes, TensorSpec


@dataclass(frozen=True, slots=True)
class StartPlan:
    """The commit to make before the first step. The same on every rank."""

    action: Literal["anchor", "continue", "revert", "delta"]
    tip: int | None
    reverts_to: int | None = None


@dataclass(frozen=True, slots=True)
class Start:
    """The decisions of rank 0 before the first step."""

    plan: StartPlan
    base_model: AdapterBase | None
    assets: tuple[AssetRef, ...]
    """The model's small files."""
    has_new_assets: bool
    """Whether the chain's tip has other ones."""
    session_id: str
    tip: VersionMark | None
    is_milestone: bool
    """Whether the tip is one."""


def tensors_and_base(model: Any, group: RankGroup, rule: DtypeRule) -> tuple[LocatedTensors, AdapterBase | None]:
    """Returns the tensors that the chain holds, and the base model of an adapter. Collective.

    The tensors are those of the whole model, or of the adapter of a PeftModel. The base model is valid on rank 0 only.
    """
    group.on_all(lambda: refuse_fsdp1(model))
    if not is_peft_model(model):
        return _located(model, checkpoint_tensors, group, rule), None
    names = group.on_first(lambda: adapter_names(model))
    parts = group.on_all(lambda: adapter_parts(model, names))
    digests = _base_digests(model, parts.base, group, rule)
    located = _located(model, lambda present: adapter_parts(present, names).adapter, group, rule)
    return located, base_model_of(model, parts, digests)


def _located(
    model: Any, locate: Callable[[Any], tuple[CheckpointTensor, ...]], group: RankGroup, rule: DtypeRule
) -> LocatedTensors:
    """Returns what `locate` finds in a model, in the dtypes in which it is published."""

    def published_of(present: Any) -> tuple[CheckpointTensor, ...]:
        return published(locate(present), rule, kept_as_held(present))

    return group.on_all(lambda: LocatedTensors(model, published_of))


def specs_of(tensors: Iterable[CheckpointTensor]) -> dict[str, TensorSpec]:
    """Returns what is to be published, by name. InputError for a state without a single element."""
    specs = {tensor.spec.name: tensor.spec for tensor in tensors}
    require_elements(specs.values(), "the model")
    return specs


def _base_digests(model: Any, base: tuple[CheckpointTensor, ...], group: RankGroup, rule: DtypeRule) -> dict[str, int]:
    """Returns the digests of an adapter's base model; valid on rank 0. Collective.

    A base that was loaded in float32 from a 16-bit checkpoint has the digests of that checkpoint, provided that every
    element still has a 16-bit value.
    """

    def shards(tensors: Iterable[CheckpointTensor]) -> tuple[Shard, ...]:
        return shards_of(tensors, group.rank, group.world_size)

    in_checkpoint = narrowed(base, rule, kept_as_held(model))
    if any(a.spec != b.spec for a, b in zip(base, in_checkpoint, strict=True)):
        is_exact = group.on_all(lambda: all(map(_are_equal, shards(base), shards(in_checkpoint))))
        base = in_checkpoint if group.minimum(int(is_exact)) else base
    own = group.on_all(lambda: _digests(shards(base)))
    return summed_digests(own, (tensor.spec.name for tensor in base), group)


def _are_equal(held: Shard, cast: Shard) -> bool:
    """Returns whether casting changes no element; NaNs are equal to each other."""
    wide = held.read()
    return torch.equal(wide.nan_to_num(), cast.read().to(wide.dtype).nan_to_num())


def _digests(shards: Iterable[Shard]) -> dict[str, int]:
    return {s.segment.tensor.name: tensor_digest(s.segment, bits_of(s.read().cpu().contiguous())) for s in shards}


def decide_start(
    chain: Chain,
    settings: PublishSettings,
    model: Any,
    processing_class: Any,
    specs: dict[str, TensorSpec],
    loaded: dict[str, int],
    base_model: AdapterBase | None,
    global_step: int,
    mark: VersionMark | None,
    trail: Trail | None = None,
    dtype: str | None = None,
) -> Start:
    """Checks the bucket and the base model, plans the first commit and uploads the model's small files. For rank 0.

    `trail` is what an unfinished training of this process has written of this model. When it leads to the tip, the
    weights are the tip with further training, and the plan is that of a resume. `dtype` is the one that the config
    names, if weights are published in another one than they are held in.

    Safe to repeat. BaseMismatchError as in `plan_start`; StorageError for a bucket that cannot be written; InputError
    for a signing key that cannot be used.
    """
    check_signing_key()
    check_writable(chain.store)
    tip_version = chain.tip_version()
    tip = None if tip_version is None else chain.header(tip_version)
    base_model = require_base(None if tip is None else tip.base_model, base_model, chain_url=chain.url)
    goes_on = tip is not None and trail is not None and trail.leads_to(chain.url, tip.commit_id)
    plan = plan_start(
        chain, loaded, specs, is_resumed=global_step > 0 or goes_on, run_id=settings.run_id, stage=settings.stage,
        mark=mark,
    )  # fmt: skip
    held = () if plan.tip is None else assets_of(chain, plan.tip)
    assets = upload_assets(chain.store, model, processing_class, held, dtype)
    return Start(
        plan, base_model, assets, assets != held, secrets.token_hex(16),
        tip=None if tip is None else VersionMark.of(chain, tip), is_milestone=tip is not None and tip.is_milestone,
    )  # fmt: skip


def summed_digests(own: dict[str, int], names: Iterable[str], group: RankGroup) -> dict[str, int]:
    """Returns the state digest of every named tensor, summed over ranks; valid on rank 0 only. Collective."""
    names = tuple(names)
    limbs = torch.tensor([digest_to_limbs(own.get(name, 0)) for name in names], dtype=torch.int64).reshape(-1, 4)
    rows = group.sum_to_first(limbs).tolist()
    return {name: limbs_to_digest(row) for name, row in zip(names, rows, strict=True)}


def plan_start(
    chain: Chain,
    loaded: dict[str, int],
    specs: dict[str, TensorSpec],
    *,
    is_resumed: bool,
    run_id: str,
    stage: str,
    mark: VersionMark | None = None,
) -> StartPlan:
    """Plans the first commit. Reads only. For rank 0.

    BaseMismatchError when the weights differ from the tip's and this is no resume. A stage of this run that starts at
    step 0 and has committed versions before crashed before its first checkpoint: it resumes, too, from the version that
    it started from. `mark` saves a search: its version is used when its digests are those of the loaded weights.
    """
    tip_version = chain.tip_version()
    if tip_version is None:
        return StartPlan("anchor", None)
    tip, layout = chain.digests(tip_version), Layout.of(specs.values())
    if tip.layout != layout:
        name = min(spec.name for spec in set(tip.layout.specs) ^ set(layout.specs))
        there, here = tip.layout.by_name.get(name), specs.get(name)
        remedy = "Name a chain of its own for this model"
        if there is not None and here is not None and there.shape == here.shape:
            remedy += f", or the dtype that the chain has: dtype='{DTYPES[there.dtype].torch_name}'"
        raise BaseMismatchError(
            f"{chain.url} holds another model: tensor {name} is {there} in the chain, {here} here. {remedy}",
            tensor=name, version=tip_version, expected=str(there), actual=str(here),
        )  # fmt: skip
    held = StateDigests.of(tip.layout, loaded)
    if tip == held:
        return StartPlan("continue", tip_version)
    earlier = _marked_version(chain, held, mark)
    if earlier is None:
        earlier = _newest_at(chain, tip_version - 1, held)
    if earlier is not None and (is_resumed or _are_of(chain.headers(earlier + 1, tip_version), run_id, stage)):
        return StartPlan("revert", tip_version, earlier)
    if is_resumed:
        return StartPlan("delta", tip_version)
    name = tip.differing(held)[0]
    there_digest, here_digest = format_digest(tip[name]), format_digest(held[name])
    raise BaseMismatchError(
        f"the loaded weights are not version {tip_version} of {chain.url} (tensor {name}: digest {here_digest}, "
        f"in the chain {there_digest}). Start from that version (weightline pull), or name a new chain",
        tensor=name, version=tip_version, expected=there_digest, actual=here_digest,
    )  # fmt: skip


def _newest_at(chain: Chain, last: int, held: StateDigests) -> int | None:
    """Returns the newest version up to `last` that has this state: by the root in its header, where it has one."""
    roots: dict[str, str | None] = {}
    for header in chain.headers_newest_first(last):
        if not isinstance(header, HeaderV2):
            if chain.digests(header.version) == held:
                return header.version
            continue
        layout = header.layout.sha256
        if layout not in roots:
            roots[layout] = held.root(layout) if chain.layout(header.version) == held.layout else None
        if header.root == roots[layout]:
            return header.version
    return None


def _marked_version(chain: Chain, held: StateDigests, mark: VersionMark | None) -> int | None:
    """Returns the mark's version if the chain has that commit and its digests are those of the loaded weights."""
    if mark is None:
        return None
    try:
        header = chain.header(mark.version)
    except NotFoundError:
        return None
    return mark.version if header.commit_id == mark.commit_id and chain.digests(mark.version) == held else None


def _are_of(headers: Iterable[Header], run_id: str, stage: str) -> bool:
    return all((header.run_id, header.stage) == (run_id, stage) for header in headers)


def changes_from_tip(chain: Chain, tip: int, baseline: Baseline, *, ranked: bool) -> tuple[Changes, ...]:
    """Returns the changes from the chain's tip to this rank's baseline. Reads the chain by groups of tensors."""
    found: list[Changes] = []
    with fetching(chain.store) as fetcher:
        for names in tensor_groups([shard.segment.tensor for shard in baseline.shards]):
            state = read_state(chain, tip, names.__contains__, fetcher)
            parts = (
                (segment, state.segment_bits(segment), bits_N)
                for segment, bits_N in baseline.segments()
                if segment.tensor.name in names
            )
            found += capture_all(parts, ranked=ranked)
    return tuple(found)
