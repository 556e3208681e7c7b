"""Small chains for tests, written through the same rooms that the trainer writes through."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import numpy.typing as npt

from weightline.chain.read.history import Chain
from weightline.chain.write.commit import commit_manifest, new_commit_id
from weightline.codec.anchor import ANCHOR_CODING
from weightline.codec.capture import capture
from weightline.codec.coding import coding_named
from weightline.codec.digest import format_digest, tensor_digest
from weightline.dtypes import bits_dtype
from weightline.format import keys
from weightline.format.header import encoded, parse_header
from weightline.format.manifest import AssetRef, Manifest, PayloadRef, TensorState, utc_now
from weightline.format.state_digests import pack_changes
from weightline.format.write_payload import write_anchor, write_delta
from weightline.store import Store
from weightline.store.base import read_clock
from weightline.store.memory import MemoryStore
from weightline.types import Segment, TensorSpec

#: For gc: everything may go that is not kept, however new.
AT_ONCE = timedelta(0)
State = Mapping[str, npt.NDArray[np.uint16]]


def segments_of(state: State, rank: int, world_size: int) -> list[Segment]:
    """Even slices of tensors in bf16, or in float32 where elements have four bytes, as ranks hold them."""
    found = []
    for name, bits in state.items():
        size = -(-bits.size // world_size)
        start = min(size * rank, bits.size)
        found.append(Segment(_spec(name, bits), start, min(size, bits.size - start)))
    return [segment for segment in found if segment.length]


def commit_state(
    chain: Chain,
    new: State,
    old: State | None = None,
    *,
    world_size: int = 2,
    stage: str = "sft",
    run_id: str = "run-1",
    assets: tuple[AssetRef, ...] = (),
    is_milestone: bool = False,
    coding: str = "gap",
    written_as: str | None = None,
    provenance: Mapping[str, str] | None = None,
) -> Manifest:
    """Commit `new` as the next version: an anchor when `old` is None, else the delta from it.

    `written_as`: the format; None for that in which the chain goes on.
    """
    tip = chain.tip_version()
    version = 0 if tip is None else tip + 1
    commit_id = new_commit_id()
    payloads, num_changed = [], 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "payload.safetensors"
        for rank in range(world_size):
            segments = segments_of(new, rank, world_size)
            if old is None:
                info = write_anchor(path, ((s, _part(new, s)) for s in segments))
            else:
                changes = [
                    capture(s, _part(old, s), _part(new, s), ranked=coding_named(coding).ranked) for s in segments
                ]
                info = write_delta(path, [c for c in changes if c.num_changed], coding)
            num_changed += info.num_changed
            key = keys.payload(version, commit_id, rank)
            chain.store.put_file(key, path)
            payloads.append(PayloadRef(key=key, nbytes=info.nbytes, sha256=info.sha256, rank=rank))
    manifest = make_manifest(new, version, commit_id, tuple(payloads), is_anchor=old is None).model_copy(
        update={
            "stage": stage,
            "run_id": run_id,
            "assets": assets,
            "provenance": dict(provenance or {}),
            "is_milestone": is_milestone,
            "coding": coding if old else ANCHOR_CODING,
        }
        | ({"num_changed": num_changed} if old is not None else {})
    )
    return commit_manifest(chain, manifest, written_as=written_as)


def _spec(name: str, bits: npt.NDArray[np.uint16]) -> TensorSpec:
    return TensorSpec(name, "F32" if bits.itemsize == 4 else "BF16", bits.shape)


def make_manifest(
    state: State, version: int, commit_id: str, payloads: tuple[PayloadRef, ...], *, is_anchor: bool
) -> Manifest:
    specs = [_spec(name, bits) for name, bits in state.items()]
    tensors = {s.name: TensorState(dtype=s.dtype, shape=s.shape, digest=_digest(state, s)) for s in specs}
    payload_nbytes = sum(payload.nbytes for payload in payloads)
    num_elements = sum(spec.num_elements for spec in specs)
    return Manifest(
        version=version, base_version=None if is_anchor else version - 1, kind="anchor" if is_anchor else "delta",
        commit_id=commit_id, created_at=utc_now(), run_id="run-1", stage="sft", global_step=version, coding="gap",
        world_size=2, num_changed=num_elements if is_anchor else 0, num_elements=num_elements,
        payload_nbytes=payload_nbytes, full_nbytes=sum(spec.nbytes for spec in specs), payloads=payloads,
        tensors=tensors,
    )  # fmt: skip


def restate(chain: Chain, version: int, digests: Mapping[str, int]) -> None:
    """Let a version state other digests of some tensors, so that all else in the bucket agrees with it."""
    key = keys.commit(version)
    header = parse_header(chain.store.get(key))
    if isinstance(header, Manifest):
        changed = {n: t.model_copy(update={"digest": format_digest(digests[n])}) for n, t in header.tensors.items()
                   if n in digests}  # fmt: skip
        chain.store.put(key, header.model_copy(update={"tensors": header.tensors | changed}).to_bytes())
        return
    stated = Chain(chain.store).digests(version).copy()
    for name, digest in digests.items():
        stated[name] = digest
    listed_T = chain.contents.digest_list(header.digests.sha256, header.layout.num_tensors)
    changes = encoded(pack_changes(listed_T, stated.digests_T)[0])
    update = {
        "root": stated.root(header.layout.sha256),
        "digests": header.digests.model_copy(update={"changes": changes}),
    }
    chain.store.put(key, header.model_copy(update=update).to_bytes())


def later(**duration: float) -> Callable[[Store], datetime]:
    """A store's clock that has gone on for so long."""
    return lambda store: read_clock(store) + timedelta(**duration)


def copy_of(store: MemoryStore) -> MemoryStore:
    """Another bucket of the same name with the same objects, for a test to spoil."""
    copied = MemoryStore(store.url)
    for info in store.list(""):
        copied.put(info.key, store.get(info.key))
    return copied


def random_state(seed: int, shapes: Mapping[str, tuple[int, ...]] | None = None) -> dict[str, npt.NDArray[np.uint16]]:
    """bf16 bits of small normal numbers."""
    rng = np.random.default_rng(seed)
    shapes = shapes or {"model.embed.weight": (40, 8), "model.norm.weight": (8,), "scale": (), "empty": (0, 4)}
    return {
        name: (rng.normal(0, 0.02, shape).astype(np.float32).reshape(shape).view(np.uint32) >> 16).astype(
            bits_dtype("BF16")
        )
        for name, shape in shapes.items()
    }


def nudged(state: State, seed: int, density: float = 0.05) -> dict[str, npt.NDArray[np.uint16]]:
    """The state with some elements moved by one unit in the last place, as an optimizer step does."""
    rng = np.random.default_rng(seed)
    moved = {}
    for name, bits in state.items():
        mask = rng.random(bits.shape) < density
        moved[name] = np.where(mask, bits ^ np.uint16(1), bits).astype(bits.dtype)
    return moved


def _part(state: State, segment: Segment) -> npt.NDArray[np.uint16]:
    return state[segment.tensor.name].reshape(-1)[segment.start : segment.stop]


def _digest(state: State, spec: TensorSpec) -> str:
    flat = state[spec.name].reshape(-1)
    return format_digest(tensor_digest(Segment(spec, 0, flat.size), flat))
