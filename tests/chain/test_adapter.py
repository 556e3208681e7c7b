"""An adapter's folder is tied to its base model wherever that lies on this host, and it is said when it is not."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from typer.testing import CliRunner

from weightline.chain.read.history import Chain, open_chain
from weightline.chain.write.standalone import commit_folder
from weightline.cli.main import app
from weightline.errors import BaseMismatchError, InputError
from weightline.store.memory import MemoryStore


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """An adapter beside its base model."""
    for name in ("base", "adapter"):
        (tmp_path / name).mkdir()
    save_file({"weight": np.arange(8, dtype=np.float32)}, tmp_path / "base" / "model.safetensors")
    save_file({"lora_A": np.ones(4, np.float32)}, tmp_path / "adapter" / "adapter_model.safetensors")
    return named(tmp_path / "adapter", "../base")


def named(adapter: Path, base: object) -> Path:
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    return adapter


def test_a_base_is_found_beside_the_folder_and_from_here(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    beside = commit_folder(Chain(MemoryStore()), adapter).base_model
    assert beside is not None
    assert (beside.name_or_path, beside.num_elements) == ("../base", 8)
    monkeypatch.chdir(adapter.parent)
    from_here = commit_folder(Chain(MemoryStore()), named(adapter, "base")).base_model
    assert from_here is not None
    assert from_here.digest == beside.digest


def test_a_base_that_is_named_is_taken(adapter: Path, tmp_path: Path) -> None:
    tied = commit_folder(Chain(MemoryStore()), adapter).base_model
    assert tied is not None
    chain = Chain(MemoryStore())
    for base in (tmp_path / "base", tmp_path / "base" / "model.safetensors"):
        model = commit_folder(chain, named(adapter, "owner/base"), base=base).base_model
        assert model is not None
        assert (model.name_or_path, model.digest) == ("owner/base", tied.digest)
    other = tmp_path / "other.safetensors"
    save_file({"weight": np.zeros(8, np.float32)}, other)
    with pytest.raises(BaseMismatchError, match="belongs to"):
        commit_folder(chain, adapter, base=other)


def test_a_base_that_cannot_be_one_is_refused(adapter: Path, tmp_path: Path) -> None:
    chain = Chain(MemoryStore())
    with pytest.raises(InputError, match="it is no adapter"):
        commit_folder(chain, tmp_path / "base", base=tmp_path / "base")
    with pytest.raises(InputError):
        commit_folder(chain, adapter, base=tmp_path / "nowhere")
    for broken in (1, ["base"], {}):
        with pytest.raises(InputError, match="not a name"):
            commit_folder(chain, named(adapter, broken))
    assert chain.tip_version() is None


def test_the_command_says_when_a_version_is_tied_to_no_base(adapter: Path, tmp_path: Path) -> None:
    url, command = (
        f"file://{tmp_path}/bucket",
        ["commit", f"file://{tmp_path}/bucket", str(named(adapter, "owner/base"))],
    )
    untied = CliRunner().invoke(app, command, catch_exceptions=False)
    tied = CliRunner().invoke(app, [*command, "--base", str(tmp_path / "base")], catch_exceptions=False)
    assert "--base FOLDER" in untied.stderr
    assert (tied.exit_code, tied.stderr) == (0, "")
    assert [m.base_model is None for m in open_chain(url).manifests()] == [True, False]
    again = CliRunner().invoke(app, command, catch_exceptions=False)
    assert again.stderr == ""
    assert open_chain(url).tip().base_model == open_chain(url).manifest(1).base_model
