"""The dtype in which tensors are published, where it is not the one in which training holds them.

Mixed precision keeps float32 master weights, of which an optimizer step changes nearly every bit, and computes in bf16
or fp16. The model is served in 16 bits as well, so the chain holds the masters rounded: a version is then the cast of
what `save_model` writes, bit for bit, and most elements keep their bits between two versions.

The rule of `auto`: where training computes in bf16 or fp16, weights that are held in float32 are published in the
16-bit dtype that the model's config names, as loaded or as on disk, or else in the one that training computes in;
everything else is published as it is held. A config that names float32 counts as naming none, because every trainer
that holds float32 masters writes it, and servers make 16-bit weights of such a checkpoint.

Buffers, router biases and what a model's class names in `_keep_in_fp32_modules` or `_keep_in_fp32_modules_strict` are
never cast, whatever the setting is.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from weightline.chain.read.history import Chain
from weightline.codec.torch_ops import dtype_code, torch_dtype
from weightline.dtypes import DTYPES, DtypeSetting
from weightline.naming import CheckpointTensor, spec_of, without_wrappers
from weightline.types import TensorSpec

#: What an explicit dtype casts. Float8 weights have scales beside them, without which a cast means nothing.
_CASTABLE = frozenset({"F16", "BF16", "F32", "F64"})
_HALF = frozenset({"F16", "BF16"})
#: By accelerate's names of mixed precision. Under fp8, layers that are not fp8 compute in bf16.
_COMPUTE_CODES = {"bf16": "BF16", "fp16": "F16", "fp8": "BF16"}
#: Biases that steer which experts a token takes, in architectures that do not name them as float32 themselves.
ROUTER_BIAS = re.compile(r"(^|\.)(e_score_correction|score_correction|correction|expert)_bias$")


@dataclass(frozen=True, slots=True)
class DtypeRule:
    """Says in which dtype a held tensor is published. The same on every rank. Dtypes are safetensors codes."""

    target: str | None = None
    """The dtype to cast to. None: everything is published as it is held."""
    sources: frozenset[str] = frozenset()
    """Held dtypes that are cast."""
    reason: str = ""
    """Why it is this dtype, as part of a sentence."""
    at_tip: Mapping[str, str] = field(default_factory=dict)
    """By tensor: the dtype that the chain has already, which counts before `target`."""
    base: str | None = None
    """The dtype of the checkpoint that the base model of an adapter was loaded from, where it is narrower."""

    def dtype_of(self, spec: TensorSpec) -> str:
        """Returns the dtype in which a tensor is published that is held as `spec` says."""
        if self.target is None or spec.dtype not in self.sources:
            return spec.dtype
        at_tip = self.at_tip.get(spec.name, self.target)
        return at_tip if at_tip in _HALF or at_tip == spec.dtype else self.target


def decide_rule(setting: DtypeSetting, model: Any, mixed_precision: str | None, chain: Chain) -> DtypeRule:
    """Decides on rank 0. `mixed_precision`: accelerate's name of what training computes in, where it is known.

    Reads the chain's tip and the config of the model's checkpoint, no weights. Raises what reading the chain raises.
    """
    if setting == "held":
        return DtypeRule()
    if setting != "auto":
        return DtypeRule(_code(setting), _CASTABLE, f"as dtype='{setting}' asks for", base=_config_dtype(model))
    computed = _COMPUTE_CODES.get(mixed_precision or "") or _fsdp2_compute_dtype(model)
    if computed is None:
        return DtypeRule()
    configured = _config_dtype(model)
    reason = "the dtype of the model's config" if configured else "in which training computes"
    tip = chain.tip_version()
    at_tip = {} if tip is None else {spec.name: spec.dtype for spec in chain.layout(tip).specs}
    return DtypeRule(configured or computed, frozenset({"F32"}), reason, at_tip, base=configured)


def published(
    tensors: Iterable[CheckpointTensor], rule: DtypeRule, kept: frozenset[int]
) -> tuple[CheckpointTensor, ...]:
    """Returns the tensors with the dtypes in which they are published. `kept`: as `kept_as_held` returns it."""
    return tuple(
        tensor
        if id(tensor.held) in kept
        else replace(tensor, spec=replace(tensor.spec, dtype=rule.dtype_of(tensor.spec)))
        for tensor in tensors
    )


def narrowed(base: tuple[CheckpointTensor, ...], rule: DtypeRule, kept: frozenset[int]) -> tuple[CheckpointTensor, ...]:
    """Returns the base of an adapter with the dtypes of the checkpoint that it was loaded from, as far as is known."""
    if rule.base is None:
        return base
    return published(base, DtypeRule(rule.base, frozenset({"F32"})), kept)


def main_dtype(specs: Iterable[TensorSpec]) -> str | None:
    """Returns the dtype that most floating-point elements have."""
    counts: Counter[str] = Counter()
    for spec in specs:
        if spec.dtype in _CASTABLE:
            counts[spec.dtype] += spec.num_elements
    return counts.most_common(1)[0][0] if counts else None


def config_of_cast(config: Any, code: str | None) -> Any:
    """Returns the config with the dtype that the published weights have, so that a pulled folder loads as it is.

    `code` is None where nothing is cast. The config and those of its parts are changed in place: pass a copy.
    """
    if code is not None and hasattr(config, "to_dict"):
        for part in (config, *(part for name, part in vars(config).items() if name.endswith("_config"))):
            if getattr(part, "dtype", None) is not None or part is config:
                part.dtype = torch_dtype(code)
    return config


def kept_as_held(model: torch.nn.Module) -> frozenset[int]:
    """Returns the ids of the held tensors that are never cast: buffers, and what the architecture keeps in float32."""
    kept = {id(buffer) for buffer in model.buffers()}
    for prefix, module in model.named_modules():
        patterns = _float32_patterns(module)
        for name, parameter in module.named_parameters(recurse=bool(patterns), remove_duplicate=False):
            name = without_wrappers(f"{prefix}.{name}" if prefix else name)
            if ROUTER_BIAS.search(name) or any(pattern.search(name) for pattern in patterns):
                kept.add(id(parameter))
    return frozenset(kept)


def describe_cast(tensors: Iterable[CheckpointTensor], rule: DtypeRule) -> str | None:
    """Returns the line that says what is cast, or None where every tensor is published as it is held."""
    casts = {(spec_of(tensor.spec.name, tensor.held).dtype, tensor.spec.dtype) for tensor in tensors}
    changed = sorted((_name(a), _name(b)) for a, b in casts if a != b)
    if not changed:
        return None
    pairs = ", ".join(f"held in {a} are published in {b}" for a, b in changed)
    reason = rule.reason if {b for _, b in changed} == {_name(rule.target or "")} else "the dtype of the chain's tip"
    return f"weights {pairs}, {reason}. dtype='held' publishes them as they are held"


def explain_large_change(num_changed: Mapping[TensorSpec, int]) -> str | None:
    """Returns why a sync changed more than half of all elements, and the remedy; None when it changed no more."""
    num_elements = sum(spec.num_elements for spec in num_changed)
    total = sum(num_changed.values())
    if 2 * total <= num_elements:
        return None
    share = f"{100 * total / num_elements:.0f} % of all elements changed in one sync"
    wide = sum(count for spec, count in num_changed.items() if spec.dtype in ("F32", "F64"))
    if 2 * wide > total:
        return (
            f"{share}: nearly every optimizer step changes a float32 weight. Publish 16-bit weights with "
            "dtype='bfloat16', of which a step changes few"
        )
    return (
        f"{share}, although they are 16-bit weights: the learning rate is high for their precision. With a lower one "
        "most weights keep their bits; check also that training starts from the weights that the chain has"
    )


def _float32_patterns(module: torch.nn.Module) -> list[re.Pattern[str]]:
    """What a model of transformers keeps in float32, as patterns of names: `*` stands for anything."""
    names: set[str] = set()
    for attribute in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"):
        found = getattr(module, attribute, None)
        names |= set(found) if isinstance(found, list | set | tuple | frozenset) else set()
    return [re.compile(name.replace("*", ".*")) for name in sorted(names)]


def _config_dtype(model: Any) -> str | None:
    """Returns the 16-bit dtype that the model's config names, or else that of the checkpoint it was loaded from.

    `from_pretrained` writes the dtype that it loads into the model's config, so that the config of a model that TRL
    loaded says float32. The config of its checkpoint is read from disk or from the Hub's cache.
    """
    config = getattr(model, "config", None)
    if config is None:
        return None
    own = _first_half(_dtypes_in(config))
    return own or _first_half(_dtypes_in(_checkpoint_config(config)))


def _checkpoint_config(config: Any) -> dict[str, Any]:
    from transformers import PreTrainedConfig

    source = getattr(config, "_name_or_path", None)
    if not source:
        return {}
    try:
        document, _ = PreTrainedConfig.get_config_dict(
            source, local_files_only=True, revision=getattr(config, "_commit_hash", None)
        )
    except (OSError, ValueError):  # not on this machine
        return {}
    found: dict[str, Any] = document
    return found


def _dtypes_in(config: Any) -> Iterator[Any]:
    """Yields what a config and the configs in it say of dtypes, its own before its parts', the text model's first."""
    fields = config if isinstance(config, dict) else vars(config)
    yield from (fields.get(name) for name in ("dtype", "torch_dtype", "_dtype"))
    parts = {name: part for name, part in fields.items() if name.endswith("_config") and part is not None}
    for _, part in sorted(parts.items(), key=lambda item: item[0] != "text_config"):
        if isinstance(part, dict) or hasattr(part, "to_dict"):
            yield from _dtypes_in(part)


def _first_half(dtypes: Iterable[Any]) -> str | None:
    """The first 16-bit dtype among them; each is a dtype of torch, its name, or by submodule."""
    for dtype in dtypes:
        code = _code(dtype.get("") if isinstance(dtype, dict) else dtype)
        if code in _HALF:
            return code
    return None


def _code(dtype: Any) -> str | None:
    name = str(dtype).removeprefix("torch.")
    return next((code for code, known in DTYPES.items() if known.torch_name == name), None)


def _name(code: str) -> str:
    return DTYPES[code].torch_name if code in DTYPES else code


def _fsdp2_compute_dtype(model: Any) -> str | None:
    """The 16-bit dtype in which `fully_shard` lets a model compute, where its policy names one."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules() if isinstance(model, torch.nn.Module) else ():
        if isinstance(module, FSDPModule):
            policy = getattr(module._get_fsdp_state(), "_mp_policy", None)
            dtype = getattr(policy, "param_dtype", None)
            if dtype is not None and (code := dtype_code(dtype)) in _HALF:
                return code
    return None
