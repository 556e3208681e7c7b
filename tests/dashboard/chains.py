"""Chains to look at, written through the rooms that trainers and replicas write through."""

from __future__ import annotations

import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np

from tests.chains import State, make_manifest, random_state
from weightline.chain import Chain, open_chain
from weightline.chain.read.records import EVALUATIONS, REFRESHES, write_record
from weightline.chain.read.refs import move_ref
from weightline.chain.upkeep.compact import plan_compaction, write_compaction
from weightline.chain.write.commit import commit_manifest, new_commit_id
from weightline.chain.write.standalone import commit_fork, commit_revert
from weightline.codec.capture import capture
from weightline.format import keys
from weightline.format.manifest import Manifest, PayloadRef
from weightline.format.write_payload import write_anchor, write_delta
from weightline.types import Segment, TensorSpec

HOSTILE = '"><img src=x onerror="window.hacked=1"><script>window.hacked=1</script>'
MODULES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "self_attn.q_norm",
           "self_attn.k_norm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "input_layernorm",
           "post_attention_layernorm")  # fmt: skip


def model_shapes(num_layers: int = 16, width: int = 24) -> dict[str, tuple[int, ...]]:
    """Names and shapes as a Qwen3 checkpoint has them, small."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (64, width)}
    for layer in range(num_layers):
        for module in MODULES:
            shape = (width,) if "norm" in module else (width, width)
            shapes[f"model.layers.{layer}.{module}.weight"] = shape
    return shapes | {"model.norm.weight": (width,)}


def trained(state: State, seed: int, density: float) -> State:
    """The state after some steps: later layers and the MLP move more, norms hardly at all."""
    rng = np.random.default_rng(seed)
    moved = {}
    for number, (name, bits) in enumerate(state.items()):
        depth = 0.35 + number / len(state)
        share = density * depth * (0.1 if "norm" in name else 1.6 if "mlp" in name else 1.0)
        moved[name] = np.where(rng.random(bits.shape) < share, bits ^ np.uint16(1), bits).astype(bits.dtype)
    return moved


def commit_step(chain: Chain, new: State, old: State | None, **fields: Any) -> Manifest:
    """Commit `new` as the next version, one rank; `fields` are the manifest's."""
    tip = chain.tip_version()
    version = 0 if tip is None else tip + 1
    commit_id = new_commit_id()
    segments = [Segment(TensorSpec(name, "BF16", bits.shape), 0, bits.size) for name, bits in new.items()]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "payload.safetensors"
        if old is None:
            info = write_anchor(path, ((s, new[s.tensor.name].reshape(-1)) for s in segments))
        else:
            before, after = ({s: state[s.tensor.name].reshape(-1) for s in segments} for state in (old, new))
            changes = [capture(s, before[s], after[s]) for s in segments]
            info = write_delta(path, [change for change in changes if change.num_changed])
        key = keys.payload(version, commit_id, 0)
        chain.store.put_file(key, path)
    payload = PayloadRef(key=key, nbytes=info.nbytes, sha256=info.sha256, rank=0)
    counted = {} if old is None else {"num_changed": info.num_changed}
    manifest = make_manifest(new, version, commit_id, (payload,), is_anchor=old is None)
    manifest = Manifest.from_bytes(manifest.model_copy(update={"world_size": 1} | counted | fields).to_bytes())
    return commit_manifest(chain, manifest)


def broken_chain(root: Path) -> Chain:
    """Seven versions, of which the manifest of version 2 is torn and that of version 4 is gone."""
    chain = open_chain(root.as_uri())
    state = random_state(0, model_shapes(2))
    commit_step(chain, state, None, is_milestone=True)
    for version in range(1, 7):
        before, state = state, trained(state, version, 0.02)
        commit_step(chain, state, before)
    (root / keys.commit(2)).write_text('{"format": "weightline/1", "version": 2}')
    (root / keys.commit(4)).unlink()
    return chain


def stamp(seconds_ago: float) -> str:
    moment = datetime.now(UTC) - timedelta(seconds=seconds_ago)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def record_life(chain: Chain, version: int, score: float | None, seconds_ago: float) -> None:
    """An evaluation and two refreshes, as the flows leave them."""
    if score is None:
        write_record(chain, EVALUATIONS, version, "arithmetic", {"status": "skipped", "newer_version": version + 1})
    else:
        told = {"status": "done", "score": score, "metrics": {"exact_match,none": score}, "num_problems": 400}
        write_record(chain, EVALUATIONS, version, "arithmetic", told | {"seconds": 9.6})
    for replica, lag in (("replica-0", 2.4), ("replica-1", 3.1)):
        served = {"status": "done", "served_at": stamp(seconds_ago - lag), "pause_seconds": 0.011 + 0.001 * version}
        write_record(chain, REFRESHES, version, replica, served)


def demo_chains(bucket: str) -> tuple[Chain, Chain]:
    """A chain of three stages with a revert, shortcuts and names, and a fork of it."""
    chain = open_chain(f"{bucket}/qwen3-math")
    state = random_state(7, model_shapes())
    plan = [("sft", 8, 0.030), ("dpo", 7, 0.006), ("grpo", 12, 0.011)]
    total = 1 + sum(number for _, number, _ in plan)
    common = {"run_id": "qwen3-math-0412", "provenance": {"flow_run_id": "0193a1b2-7c11-4f7e-9a55-6f1c2d3e4f50"}}
    commit_step(chain, state, None, is_milestone=True, created_at=stamp(60 * total), **common)
    record_life(chain, 0, 0.212, 60 * total)
    version, before = 0, state
    for stage, number, density in plan:
        for step in range(1, number + 1):
            version += 1
            before, state = state, trained(state, version, density * (1.15 - step / (2 * number)))
            ago = 60.0 * (total - version)
            metrics = {"loss": _loss(stage, step), "grad_norm": 1.0 / step, "learning_rate": 1e-6}
            if stage == "grpo":
                metrics["reward"] = 0.55 + 0.32 * (1 - 0.8**step)
            fields = common | {"stage": stage, "global_step": 10 * step, "metrics": metrics, "created_at": stamp(ago)}
            commit_step(chain, state, before, is_milestone=step == number, **fields)
            is_scored = version % 5 != 3 or step == number
            record_life(chain, version, _score(stage, step) if is_scored else None, ago)
        if stage == "sft":
            write_compaction(chain, plan_compaction(chain, coding="gap"), coding="gap")
    commit_revert(chain, 25)
    write_compaction(chain, plan_compaction(chain, coding="gap"), coding="gap")
    move_ref(chain, "best", 25)
    move_ref(chain, "v1.0", 15, is_tag=True)
    fork = open_chain(f"{bucket}/qwen3-math-long")
    commit_fork(chain, 15, fork)
    return chain, fork


def _loss(stage: str, step: int) -> float:
    return {"sft": 1.9 * 0.8**step + 0.2, "dpo": 0.69 * 0.96**step, "grpo": 0.02 / step}[stage]


def _score(stage: str, step: int) -> float:
    start, gain = {"sft": (0.21, 0.42), "dpo": (0.63, 0.05), "grpo": (0.68, 0.17)}[stage]
    return round(start + gain * (1 - 0.72**step) - (0.03 if stage == "grpo" and step > 10 else 0), 3)
