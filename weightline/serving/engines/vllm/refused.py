"""What a vLLM that is a replica cannot be started with, and why: by its options, and by the config made of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from weightline.errors import InputError, UnsupportedFeatureError

_REPLICAS = "start one replica for each engine; they follow the chain by themselves"
_ONE_PROCESS = "one process answers requests, so that it can hold them back during a refresh"
_QUANTIZED = "quantized weights are computed from the chain's, not copies of them"
_ADAPTERS = "adapters wrap the layers that hold the weights"
_DRAFT = "a draft model's weights are not in the chain"
_MOVING = "it moves the weights of experts from place to place"
_NO_MIDDLEWARE = "it has no middleware that could hold requests back during a refresh"
_ONE_HOST = "changes reach the workers through shared memory"

#: Options, with all names that vLLM knows them by.
_OPTIONS = {
    "--load-format": "the replica loads the weights, from the chain",
    "--worker-extension-cls": "the replica's own is the worker extension",
    "--config": "options in a file are not seen here: name them on the command line",
    "--headless": "the replica is the process that answers requests",
    **dict.fromkeys(("--grpc", "--grpc-port"), _NO_MIDDLEWARE),
    **dict.fromkeys(("--api-server-count", "-asc"), _ONE_PROCESS),
    **dict.fromkeys(("--data-parallel-size", "-dp", "--data-parallel-size-local", "-dpl"), _REPLICAS),
    **dict.fromkeys(("--quantization", "-q", "--quantization-config"), _QUANTIZED),
    **dict.fromkeys(("--enable-lora", "--lora-modules"), _ADAPTERS),
    **dict.fromkeys(("--speculative-config", "-sc", "--spec-method", "--spec-model", "--spec-tokens"), _DRAFT),
    "--enable-eplb": _MOVING,
    **dict.fromkeys(("--nnodes", "-n"), _ONE_HOST),
}
_OTHER_FRONTEND = "VLLM_USE_RUST_FRONTEND"

#: Where it stands in vLLM's config, what a value means that a replica cannot have, and why.
_CONFIG: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("parallel_config.data_parallel_size", lambda size: size > 1, _REPLICAS),
    ("parallel_config._api_process_count", lambda count: count > 1, _ONE_PROCESS),
    ("parallel_config.enable_eplb", bool, _MOVING),
    ("parallel_config.nnodes", lambda count: count > 1, _ONE_HOST),
    ("model_config.quantization", bool, _QUANTIZED),
    ("lora_config", bool, _ADAPTERS),
    ("speculative_config", bool, _DRAFT),
)


def check_arguments(vllm_args: Sequence[str]) -> None:
    """InputError for the first option that a replica cannot be started with, however vLLM would let it be spelled.

    vLLM takes an option by any beginning of its name that no other shares, with `_` for `-`, with a part of its value
    after a dot (`--speculative-config.method`), and a short one together with its value (`-qfp8`).
    """
    for argument in vllm_args:
        name = _refused_name(argument.partition("=")[0].partition(".")[0].replace("_", "-"))
        if name is not None:
            raise InputError(f"vLLM's {name} cannot be given here: {_OPTIONS[name]}", field=name)


def check_environment(environ: Mapping[str, str]) -> None:
    """InputError when the environment has vLLM start another front end than the one that takes a middleware."""
    if environ.get(_OTHER_FRONTEND, "0") != "0":
        raise InputError(f"{_OTHER_FRONTEND} cannot be set here: {_NO_MIDDLEWARE}", field=_OTHER_FRONTEND)


def check_config(config: Any) -> None:
    """UnsupportedFeatureError when vLLM's own config, made of options, environment and model, cannot be a replica's."""
    for path, is_refused, why in _CONFIG:
        found = config
        for part in path.split("."):
            found = getattr(found, part, None)
        if found is not None and is_refused(found):
            raise UnsupportedFeatureError(f"vLLM started with {path} = {found}: {why}", feature=path)


def _refused_name(given: str) -> str | None:
    """The refused option that `given` may stand for; None for another option, and for a value."""
    if not given.startswith("-") or not given.strip("-"):
        return None
    return next((name for name in _OPTIONS if name.startswith(given) or _has_value(given, name)), None)


def _has_value(given: str, name: str) -> bool:
    """Whether `given` is an option of one letter and its value."""
    return len(name) == 2 and given.startswith(name)
