"""What is decided before a vLLM starts: its arguments, its folder, which routes are open, what it must offer."""

from __future__ import annotations

import importlib.util
import uuid
from pathlib import Path

import pytest
import torch

from tests.receiver.model_chains import make_chain
from weightline.errors import ApplyError, InputError, UnsupportedFeatureError
from weightline.receiver.engines.vllm.cpu import require_unpacked
from weightline.receiver.engines.vllm.features import SERVER, missing, require
from weightline.receiver.engines.vllm.routes import Route, classify
from weightline.receiver.engines.vllm.serve import check_arguments, fetch_model_folder, vllm_argv
from weightline.receiver.server import ServerSettings

SETTINGS = ServerSettings("memory://chain/toy", Path("state"), port=8123)


@pytest.mark.parametrize("argument", ["--load-format=auto", "--load_format", "--api-server-count", "--enable-lora"])
def test_options_that_would_undo_a_replica_are_refused_by_name(argument: str) -> None:
    with pytest.raises(InputError, match="cannot be given here"):
        check_arguments(["--max-model-len", "9", argument])


def test_other_options_go_to_vllm_and_the_dtype_is_the_chains(tmp_path: Path) -> None:
    check_arguments(["--max-model-len", "9"])
    manifest = make_chain(f"memory://{uuid.uuid4().hex}/toy").chain.manifest(0)
    argv = vllm_argv("toy", tmp_path, manifest, SETTINGS, ["--max-model-len", "9"])
    assert argv[:2] == ["serve", str(tmp_path)]
    assert argv[argv.index("--host") + 1] == "127.0.0.1"
    assert argv[argv.index("--port") + 1] == "8123"
    assert argv[argv.index("--load-format") + 1] == "dummy"
    assert argv[argv.index("--dtype") + 1] == "bfloat16"
    assert argv[-2:] == ["--max-model-len", "9"]
    assert vllm_argv("toy", tmp_path, manifest, SETTINGS, ["--dtype", "float32"]).count("--dtype") == 1


def test_the_model_folder_holds_the_chains_files_and_no_weights(tmp_path: Path) -> None:
    chain = make_chain(f"memory://{uuid.uuid4().hex}/toy").chain
    given = tmp_path / "given"
    given.mkdir()
    (given / "extra.json").write_text("{}")
    (given / "config.json").write_text("not the chain's")
    (given / "model.safetensors").write_bytes(b"weights")
    folder = fetch_model_folder(chain, 0, tmp_path / "model", fallback=given)
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "tokenizer.json", "extra.json"} <= names
    assert not any(name.endswith(".safetensors") for name in names)
    assert "Qwen3" in (folder / "config.json").read_text()


@pytest.mark.parametrize(
    ("method", "path", "route"),
    [
        ("POST", "/v1/completions", Route.INFERENCE), ("POST", "/v1/chat/completions", Route.INFERENCE),
        ("GET", "/health", Route.OPEN), ("GET", "/metrics", Route.OPEN), ("POST", "/health", Route.GUARDED),
        ("GET", "/weightline/status", Route.OURS), ("POST", "/weightline/refresh", Route.OURS),
        ("POST", "/pause", Route.GUARDED), ("POST", "/v1/load_lora_adapter", Route.GUARDED),
        ("POST", "/v1/completions/", Route.GUARDED), ("POST", "/V1/completions", Route.GUARDED),
        ("GET", "/v1/completions", Route.GUARDED), ("POST", "/anything/new", Route.GUARDED),
    ],
)  # fmt: skip
def test_only_what_is_named_is_open(method: str, path: str, route: Route) -> None:
    assert classify(method, path) is route


def test_a_missing_feature_is_named() -> None:
    gone = ("weightline.types", "TensorSpec.fly", "flying")
    assert missing([("weightline.types", "TensorSpec.nbytes", "sizes"), gone]) == [
        "weightline.types.TensorSpec.fly (flying)"
    ]
    with pytest.raises(UnsupportedFeatureError, match=r"TensorSpec\.fly \(flying\)"):
        require([gone])


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed here")
def test_without_a_vllm_it_says_so() -> None:
    with pytest.raises(UnsupportedFeatureError, match="the installed vLLM lacks"):
        require(SERVER)


def test_a_layer_that_computes_from_a_packed_copy_is_refused() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    require_unpacked(model)
    model[0].cpu_linear = torch.nn.functional.linear
    require_unpacked(model)
    model[0].cpu_linear = lambda x, weight, bias: x
    with pytest.raises(ApplyError, match="0 computes from a packed copy"):
        require_unpacked(model)
