"""Start vLLM's own OpenAI server as a replica: plan its arguments, get config and tokenizer, hand over to vLLM.

vLLM starts without weights; the replica loads the first version through vLLM's loader, proves it, and only then lets
requests through. A crash at any time leaves the mark, by which the next start comes back to a checked version.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from weightline.chain import Chain
from weightline.chain.files.assets import assets_of
from weightline.chain.replay.fetch import fetch_object
from weightline.dtypes import DTYPES
from weightline.errors import InputError, UnsupportedFeatureError
from weightline.format.manifest import Manifest
from weightline.serving.engines.vllm.features import SERVER, require
from weightline.serving.engines.vllm.offline import WORKER_EXTENSION
from weightline.serving.engines.vllm.refused import check_arguments, check_environment
from weightline.serving.engines.vllm.settings import SETTINGS_VARIABLE, VllmSettings
from weightline.serving.http.auth import load_token
from weightline.serving.http.server import ADDRESS_FILE, ServerSettings, own_folder, require_safe_binding, write_address
from weightline.serving.replica.registration import require_free_name
from weightline.serving.replica.status import read_mark

MIDDLEWARE = "weightline.serving.engines.vllm.middleware.ReplicaMiddleware"
#: What vLLM takes for `--dtype`.
_DTYPES = frozenset({"F16", "BF16", "F32"})


def serve_vllm(model: str, settings: ServerSettings, vllm_args: Sequence[str] = ()) -> None:
    """Serve the chain's model under the name `model` until told to stop; `vllm_args` go to `vllm serve`.

    Waits for a first version where the chain is empty. InputError for options that cannot be, an address open to others
    without a chosen token, or a state folder in use; UnsupportedFeatureError when this vLLM lacks something.
    """
    check_arguments(vllm_args)
    check_environment(os.environ)
    require_safe_binding(settings.host, settings.state_dir)
    require(SERVER)
    with own_folder(settings.state_dir):
        load_token(settings.state_dir)
        port = settings.port or _free_port(settings.host)
        chain = settings.open_chain()
        # vLLM takes a minute to start: that the name is taken is told before.
        require_free_name(chain, settings.name, settings.state_dir)
        first = _first_version(chain, settings.state_dir)
        folder = fetch_model_folder(chain, first.version, settings.state_dir / "model", fallback=Path(model))
        given = VllmSettings(server=_with_port(settings, port), model_folder=str(folder))
        os.environ[SETTINGS_VARIABLE] = given.model_dump_json()
        write_address(settings, port)
        try:
            run_vllm(vllm_argv(model, folder, first, given.server, vllm_args))
        finally:
            (settings.state_dir / ADDRESS_FILE).unlink(missing_ok=True)


def vllm_argv(
    model: str, folder: Path, first: Manifest, settings: ServerSettings, vllm_args: Sequence[str]
) -> list[str]:
    """The arguments of `vllm`. Pure. The chain's dtype is the engine's, unless one is named."""
    argv = ["serve", str(folder), "--served-model-name", model, "--host", settings.host, "--port", str(settings.port)]
    argv += ["--load-format", "dummy", "--worker-extension-cls", WORKER_EXTENSION, "--middleware", MIDDLEWARE]
    dtypes = {spec.dtype for spec in first.specs.values() if spec.dtype in _DTYPES}
    if len(dtypes) == 1 and not any(argument.partition("=")[0] == "--dtype" for argument in vllm_args):
        argv += ["--dtype", DTYPES[dtypes.pop()].torch_name]
    return [*argv, *vllm_args]


def fetch_model_folder(chain: Chain, version: int, folder: Path, *, fallback: Path) -> Path:
    """Config and tokenizer of the version, in a folder made anew; what the chain lacks is taken from `fallback`.

    InputError when neither has a config.json. Safe to repeat.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if fallback.is_dir():
        for path in fallback.iterdir():
            if path.is_file() and path.suffix in (".json", ".jinja", ".model", ".txt", ".tiktoken", ".py"):
                shutil.copyfile(path, folder / path.name)
    for asset in assets_of(chain, version):
        fetch_object(chain.store, asset, folder / asset.name)
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    if not (folder / "config.json").exists():
        raise InputError(
            f"{chain.url} holds no config.json, and {fallback} is no folder with one: name a checkpoint as MODEL",
            field="model",
        )
    return folder


def run_vllm(argv: Sequence[str]) -> None:
    """vLLM's command line, in this process. Returns when it ends; SystemExit as vLLM raises it."""
    _name_distribution()
    from vllm.entrypoints.cli.main import main

    sys.argv = ["vllm", *argv]
    main()


def _name_distribution() -> None:
    """vLLM's command line asks for the version of a distribution `vllm`; CPU builds go by other names."""
    known = importlib.metadata.version
    try:
        known("vllm")
        return
    except importlib.metadata.PackageNotFoundError:
        names = importlib.metadata.packages_distributions().get("vllm", [])
    if not names:
        raise UnsupportedFeatureError("no distribution of vLLM is installed here", feature="vllm")
    released = f"{known(names[0])}+cpu"
    setattr(importlib.metadata, "version", lambda name: released if name == "vllm" else known(name))  # noqa: B010


def _first_version(chain: Chain, state_dir: Path, poll_seconds: float = 1.0) -> Manifest:
    """The version whose config vLLM is started with: the mark's, or the tip, once there is one."""
    mark = read_mark(state_dir)
    if mark is not None and mark.chain == chain.url and mark.return_to in chain.versions():
        return chain.manifest(mark.return_to)
    while (tip := chain.tip_version()) is None:
        time.sleep(poll_seconds)
    return chain.manifest(tip)


def _free_port(host: str) -> int:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port


def _with_port(settings: ServerSettings, port: int) -> ServerSettings:
    return replace(settings, port=port)
