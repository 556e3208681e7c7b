"""What is decided before a vLLM starts: its arguments, its folder, which routes are open, what it must offer."""

from __future__ import annotations

import importlib.util
import uuid
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.serving.model_chains import make_chain
from weightline.errors import ApplyError, InputError, UnsupportedFeatureError
from weightline.serving.engines.vllm import serve
from weightline.serving.engines.vllm.features import SERVER, missing, require
from weightline.serving.engines.vllm.http import Route, classify
from weightline.serving.engines.vllm.mapping import require_unpacked
from weightline.serving.engines.vllm.serve import (
    check_arguments,
    check_config,
    check_environment,
    fetch_model_folder,
    vllm_argv,
)
from weightline.serving.http.server import ServerSettings
from weightline.serving.replica.registration import Presence, Registration
from weightline.serving.replica.status import ReplicaStatus

SETTINGS = ServerSettings("memory://chain/toy", Path("state"), port=8123)


@pytest.mark.parametrize(
    "argument",
    [
        "--load-format=auto", "--load_format", "--api-server-count", "-asc", "--enable-lora", "-dp", "-dpl",
        "-q", "-qfp8", "-q=fp8", "-sc", "--speculative-config.method", "--spec-model", "--config", "--config=x.yaml",
        "--enable-eplb", "--data_parallel_size=2", "--headless", "-n", "--nnodes=2", "--grpc",
        "--api-server-c", "--enable-lor", "--load-f=auto", "-as",
    ],
)  # fmt: skip
def test_options_that_would_undo_a_replica_are_refused_however_they_are_spelled(argument: str) -> None:
    with pytest.raises(InputError, match="cannot be given here"):
        check_arguments(["--max-model-len", "9", argument])


@pytest.mark.parametrize(
    "argument",
    ["--config-format=auto", "-tp", "-O3", "-cc.mode=3", "-1", "-", "fp8", "--num-gpu-blocks-override", "-ep"],
)
def test_other_options_and_values_are_not(argument: str) -> None:
    check_arguments(["--max-model-len", "9", argument])


def test_another_front_end_is_refused() -> None:
    check_environment({"VLLM_USE_RUST_FRONTEND": "0"})
    with pytest.raises(InputError, match="VLLM_USE_RUST_FRONTEND cannot be set here"):
        check_environment({"VLLM_USE_RUST_FRONTEND": "1"})


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("parallel_config.data_parallel_size", 2), ("parallel_config._api_process_count", 2),
        ("parallel_config.enable_eplb", True), ("parallel_config.nnodes", 2), ("model_config.quantization", "fp8"),
        ("lora_config", "some"), ("speculative_config", "some"),
    ],
)  # fmt: skip
def test_what_the_environment_or_the_model_asks_of_vllm_is_refused_too(path: str, value: object) -> None:
    parallel = SimpleNamespace(data_parallel_size=1, _api_process_count=1, enable_eplb=False, nnodes=1)
    config = SimpleNamespace(
        parallel_config=parallel, model_config=SimpleNamespace(quantization=None), lora_config=None,
        speculative_config=None,
    )  # fmt: skip
    check_config(config)
    *parts, last = path.split(".")
    setattr(getattr(config, parts[0]) if parts else config, last, value)
    with pytest.raises(UnsupportedFeatureError, match=path):
        check_config(config)


def test_a_taken_name_is_told_before_vllm_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chain = make_chain(f"memory://{uuid.uuid4().hex}/toy").chain
    status = ReplicaStatus(
        replica="replica-0", chain=chain.url, engine="vllm", state="serving", version=0, commit_id=None,
        served_at=None, last_error=None,
    )  # fmt: skip
    Registration(chain, tmp_path / "a", Presence(), lambda: status).claim()
    monkeypatch.setattr(serve, "require", lambda features: None)
    with pytest.raises(InputError, match="give this one another --name"):
        serve.serve_vllm("toy", ServerSettings(chain.url, tmp_path / "b", port=0))


def test_other_options_go_to_vllm_and_the_dtype_is_the_chains(tmp_path: Path) -> None:
    check_arguments(["--max-model-len", "9"])
    layout = make_chain(f"memory://{uuid.uuid4().hex}/toy").chain.layout(0)
    argv = vllm_argv("toy", tmp_path, layout, SETTINGS, ["--max-model-len", "9"])
    assert argv[:2] == ["serve", str(tmp_path)]
    assert argv[argv.index("--host") + 1] == "127.0.0.1"
    assert argv[argv.index("--port") + 1] == "8123"
    assert argv[argv.index("--load-format") + 1] == "dummy"
    assert argv[argv.index("--dtype") + 1] == "bfloat16"
    assert argv[-2:] == ["--max-model-len", "9"]
    assert "--enable-scale-out" in argv
    assert argv[argv.index("--logprobs-mode") + 1] == "processed_logprobs"
    given = ["--logprobs_mode=raw_logprobs", "--no-enable-scale-out"]
    assert not {"--logprobs-mode", "--enable-scale-out"} & set(vllm_argv("toy", tmp_path, layout, SETTINGS, given))
    assert vllm_argv("toy", tmp_path, layout, SETTINGS, ["--dtype", "float32"]).count("--dtype") == 1


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
        ("POST", "/pause", Route.CONTROL), ("POST", "/v1/load_lora_adapter", Route.GUARDED),
        ("POST", "/v1/completions/", Route.GUARDED), ("POST", "/V1/completions", Route.GUARDED),
        ("GET", "/v1/completions", Route.CONTROL), ("POST", "/anything/new", Route.GUARDED),
        ("OPTIONS", "/v1/completions", Route.OPEN), ("OPTIONS", "/pause", Route.CONTROL),
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
