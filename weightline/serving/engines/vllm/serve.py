"""Starts vLLM's own OpenAI server as a replica: checks its options, fetches config and tokenizer, hands over to vLLM.

vLLM starts without weights; the replica loads the first version through vLLM's loader, proves it, and only then admits
requests. A crash at any time leaves the mark, by which the next start returns to a checked version.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from weightline.chain import Chain
from weightline.chain.files.assets import assets_of, write_assets
from weightline.chain.files.small_files import find_small_files
from weightline.chain.read.discovery import warn_if_empty
from weightline.chain.replay.fetch import fetching
from weightline.dtypes import DTYPES
from weightline.errors import InputError, UnsupportedFeatureError
from weightline.files import copy_file
from weightline.format.tensor_layout import Layout
from weightline.serving.engines.vllm.features import SERVER, require
from weightline.serving.engines.vllm.wire import WORKER_EXTENSION
from weightline.serving.http.auth import load_token
from weightline.serving.http.server import (
    ADDRESS_FILE,
    ServerSettings,
    own_folder,
    require_safe_binding,
    write_address,
)
from weightline.serving.replica.registration import require_free_name
from weightline.serving.replica.status import read_mark

MIDDLEWARE = "weightline.serving.engines.vllm.http.ReplicaMiddleware"
SETTINGS_VARIABLE = "WEIGHTLINE_VLLM_REPLICA"
#: Dtypes that vLLM accepts for `--dtype`.
_DTYPES = frozenset({"F16", "BF16", "F32"})


class VllmSettings(BaseModel):
    """A vLLM replica's settings, which this process passes to the middleware in vLLM's.

    `model_folder` holds the config and the tokenizer that vLLM is started with.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    server: ServerSettings
    model_folder: str


def serve_vllm(model: str, settings: ServerSettings, vllm_args: Sequence[str] = ()) -> None:
    """Serves the chain's model under the name `model` until a signal ends it; `vllm_args` go to `vllm serve`.

    Waits for a first version if the chain is empty. InputError for options that a replica cannot be started with, for
    an address that other machines can reach without a token that an operator chose, and for a state folder in use;
    UnsupportedFeatureError when this vLLM lacks a feature.
    """
    check_arguments(vllm_args)
    check_environment(os.environ)
    require_safe_binding(settings.host, settings.state_dir)
    require(SERVER)
    with own_folder(settings.state_dir):
        load_token(settings.state_dir)
        port = settings.port or _free_port(settings.host)
        chain = settings.open_chain()
        # vLLM takes a minute to start, so a name in use is refused before that.
        require_free_name(chain, settings.name, settings.state_dir)
        first = _first_version(chain, settings.state_dir)
        folder = fetch_model_folder(chain, first, settings.state_dir / "model", fallback=Path(model))
        given = VllmSettings(server=replace(settings, port=port), model_folder=str(folder))
        os.environ[SETTINGS_VARIABLE] = given.model_dump_json()
        write_address(settings, port)
        try:
            run_vllm(vllm_argv(model, folder, chain.layout(first), given.server, vllm_args))
        finally:
            (settings.state_dir / ADDRESS_FILE).unlink(missing_ok=True)


def vllm_argv(
    model: str, folder: Path, layout: Layout, settings: ServerSettings, vllm_args: Sequence[str]
) -> list[str]:
    """Returns the arguments of `vllm`. Pure.

    Unless `vllm_args` say otherwise, the engine's dtype is the chain's, and its answers suit a trainer.
    """
    argv = ["serve", str(folder), "--served-model-name", model, "--host", settings.host, "--port", str(settings.port)]
    argv += ["--load-format", "dummy", "--worker-extension-cls", WORKER_EXTENSION, "--middleware", MIDDLEWARE]
    dtypes = {spec.dtype for spec in layout.specs if spec.dtype in _DTYPES}
    if len(dtypes) == 1 and not _is_given("--dtype", vllm_args):
        argv += ["--dtype", DTYPES[dtypes.pop()].torch_name]
    # For rollouts: the route that names the version of each token, and logprobs of the distribution that is drawn from.
    if not _is_given("--enable-scale-out", vllm_args):
        argv.append("--enable-scale-out")
    if not _is_given("--logprobs-mode", vllm_args):
        argv += ["--logprobs-mode", "processed_logprobs"]
    return [*argv, *vllm_args]


def _is_given(option: str, vllm_args: Sequence[str]) -> bool:
    """Returns whether the arguments name an option, in any spelling of vLLM: see `check_arguments`."""
    given = (argument.partition("=")[0].replace("_", "-").replace("--no-", "--", 1) for argument in vllm_args)
    return any(len(name) > len("--") and name.startswith("--") and option.startswith(name) for name in given)


def fetch_model_folder(chain: Chain, version: int, folder: Path, *, fallback: Path) -> Path:
    """Fetches config and tokenizer of the version into a new folder; files that the chain lacks come from `fallback`.

    InputError when neither has a config.json. Safe to repeat.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if fallback.is_dir():
        for name in find_small_files(fallback).taken:
            copy_file(fallback / name, folder / name)
    with fetching(chain.store) as fetcher:
        write_assets(assets_of(chain, version), folder, fetcher)
    if not (folder / "config.json").exists():
        raise InputError(
            f"{chain.url} holds no config.json, and neither does {fallback}: name a checkpoint folder as MODEL",
            field="model",
        )
    return folder


def run_vllm(argv: Sequence[str]) -> None:
    """Runs vLLM's command line in this process. Returns when it ends; SystemExit as vLLM raises it."""
    _let_vllm_find_its_version()
    from vllm.entrypoints.cli.main import main

    sys.argv = ["vllm", *argv]
    main()


class _CpuBuild(importlib.metadata.Distribution):
    """The installed distribution of a CPU build of vLLM; its version says that it is one, as vLLM expects it."""

    def __init__(self, installed: importlib.metadata.Distribution) -> None:
        self._installed = installed

    @property
    def version(self) -> str:
        return f"{self._installed.version}+cpu"

    def read_text(self, filename: str) -> str | None:
        return self._installed.read_text(filename)

    def locate_file(self, path: Any) -> Any:
        return self._installed.locate_file(path)


class _CpuBuildFinder(importlib.metadata.DistributionFinder):
    """Finds a CPU build, whose distribution has another name, when vLLM looks for the distribution `vllm`."""

    def __init__(self, build: importlib.metadata.Distribution) -> None:
        self._build = build

    def find_distributions(self, context: Any = None) -> list[importlib.metadata.Distribution]:
        return [self._build] if context is not None and context.name == "vllm" else []

    def find_spec(self, *_: object) -> None:
        """Finds no modules."""


def _let_vllm_find_its_version() -> None:
    """Adds a finder of distributions when vLLM's is not installed under the name that its command line looks for.

    UnsupportedFeatureError when no distribution of vLLM is installed.
    """
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError as error:
        names = importlib.metadata.packages_distributions().get("vllm", [])
        if not names:
            raise UnsupportedFeatureError("no distribution of vLLM is installed here", feature="vllm") from error
        sys.meta_path.append(_CpuBuildFinder(_CpuBuild(importlib.metadata.distribution(names[0]))))


def _first_version(chain: Chain, state_dir: Path, poll_seconds: float = 1.0) -> int:
    """Returns the version whose config vLLM is started with: the mark's, or the tip, once there is one."""
    mark = read_mark(state_dir)
    if mark is not None and mark.chain == chain.url and mark.return_to in chain.versions():
        return mark.return_to
    warn_if_empty(chain)
    while (tip := chain.tip_version()) is None:
        time.sleep(poll_seconds)
    return tip


def _free_port(host: str) -> int:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port


_REPLICAS = "start one replica for each engine; they follow the chain by themselves"
_ONE_PROCESS = "one process answers requests, so that it can hold them back during a refresh"
_QUANTIZED = "quantized weights are computed from the chain's, not copies of them"
_ADAPTERS = "adapters wrap the layers that hold the weights"
_DRAFT = "a draft model's weights are not in the chain"
_MOVING = "it moves the weights of experts while it serves"
_NO_MIDDLEWARE = "it has no middleware that could hold requests back during a refresh"
_ONE_HOST = "changes reach the workers through shared memory"

#: Options that a replica's vLLM cannot have, under all names that vLLM accepts, with the reason.
REFUSED_OPTIONS = {
    "--load-format": "the replica loads the weights, from the chain",
    "--worker-extension-cls": "the replica's own is the worker extension",
    "--config": "options in a file cannot be checked here: name them on the command line",
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
#: (path in vLLM's config, test for the values that a replica cannot have there, reason).
REFUSED_CONFIG: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("parallel_config.data_parallel_size", lambda size: size > 1, _REPLICAS),
    ("parallel_config._api_process_count", lambda count: count > 1, _ONE_PROCESS),
    ("parallel_config.enable_eplb", bool, _MOVING),
    ("parallel_config.nnodes", lambda count: count > 1, _ONE_HOST),
    ("model_config.quantization", bool, _QUANTIZED),
    ("lora_config", bool, _ADAPTERS),
    ("speculative_config", bool, _DRAFT),
)
_OTHER_FRONTEND = "VLLM_USE_RUST_FRONTEND"


def check_arguments(vllm_args: Sequence[str]) -> None:
    """Raises InputError for the first option that a replica cannot be started with, in any spelling of vLLM.

    vLLM accepts an option by any unique prefix of its name, with `_` for `-`, with a part of its value after a dot
    (`--speculative-config.method`), and a short option together with its value (`-qfp8`).
    """
    for argument in vllm_args:
        name = _refused_name(argument.partition("=")[0].partition(".")[0].replace("_", "-"))
        if name is not None:
            raise InputError(f"vLLM's {name} cannot be given here: {REFUSED_OPTIONS[name]}", field=name)


def check_environment(environ: Mapping[str, str]) -> None:
    """Raises InputError when the environment selects a front end of vLLM without middlewares."""
    if environ.get(_OTHER_FRONTEND, "0") != "0":
        raise InputError(f"{_OTHER_FRONTEND} cannot be set here: {_NO_MIDDLEWARE}", field=_OTHER_FRONTEND)


def check_config(config: Any) -> None:
    """Raises UnsupportedFeatureError when vLLM's config, from options, environment and model, cannot be a replica's."""
    for path, is_refused, why in REFUSED_CONFIG:
        found = config
        for part in path.split("."):
            found = getattr(found, part, None)
        if found is not None and is_refused(found):
            raise UnsupportedFeatureError(f"vLLM cannot run with {path} = {found}: {why}", feature=path)


def _refused_name(given: str) -> str | None:
    """Returns the refused option that `given` may abbreviate; None for another option, and for a value."""
    if not given.startswith("-") or not given.strip("-"):
        return None
    return next((name for name in REFUSED_OPTIONS if name.startswith(given) or _has_value(given, name)), None)


def _has_value(given: str, name: str) -> bool:
    """Returns whether `given` is an option of one letter together with its value."""
    return len(name) == 2 and given.startswith(name)
