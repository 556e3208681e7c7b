"""The small files of a model in training: those that its own save methods write, and those that changed since."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models

from weightline.chain.files.assets import assets_of
from weightline.chain.files.checkpoint import write_checkpoint
from weightline.chain.read.history import Chain
from weightline.store.memory import MemoryStore
from weightline.trainer.model_files import ModelFiles, processing_class_of, upload_assets
from weightline.trainer.session import PublishSession
from weightline.trainer.settings import PublishSettings

_CONFIGURATION = """
from transformers import PretrainedConfig
from .pieces import SIZE
class ToyConfig(PretrainedConfig):
    model_type = "toy-own-code"
    def __init__(self, hidden_size=SIZE, **kwargs):
        self.hidden_size = hidden_size
        super().__init__(**kwargs)
"""
_MODELING = """
import torch
from transformers import PreTrainedModel
from .configuration_toy import ToyConfig
class ToyModel(PreTrainedModel):
    config_class = ToyConfig
    def __init__(self, config):
        super().__init__(config)
        self.out = torch.nn.Linear(config.hidden_size, config.hidden_size)
        self.post_init()
    def forward(self, x):
        return self.out(x)
"""


def _tokenizer() -> Any:
    words = Tokenizer(models.WordLevel({f"t{number}": number for number in range(64)}, unk_token="t0"))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="t0", pad_token="t1", eos_token="t2", local_files_only=True
    )


def _model() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, pad_token_id=1,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def _small_files(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".safetensors")
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
    found.pop("weightline.json", None)
    return found


def test_a_version_has_the_files_that_the_libraries_save(tmp_path: Path) -> None:
    model, tokenizer = _model(), _tokenizer()
    tokenizer.chat_template = {"default": "plain {{ messages }}", "tool use": "tools {{ tools }}", "rag": "rag"}
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "saved")
    chain = Chain(MemoryStore("memory://saved"))
    with PublishSession(chain, PublishSettings()) as session:
        session.start(model, tokenizer)
    write_checkpoint(chain, 0, tmp_path / "pulled")
    saved, pulled = _small_files(tmp_path / "saved"), _small_files(tmp_path / "pulled")
    assert "additional_chat_templates/tool use.jinja" in saved
    configs = {"config.json", "tokenizer_config.json"}
    assert {n: raw for n, raw in pulled.items() if n not in configs} == {
        n: raw for n, raw in saved.items() if n not in configs
    }
    for name in configs:
        expected = json.loads(saved[name])
        expected.pop("local_files_only", None), expected.pop("is_local", None)
        assert json.loads(pulled[name]) == expected
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "pulled", local_files_only=True)
    assert loaded.chat_template == tokenizer.chat_template


def test_a_model_with_its_own_code_loads_from_a_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    start = tmp_path / "start"
    start.mkdir()
    (start / "pieces.py").write_text("SIZE = 8\n")
    (start / "configuration_toy.py").write_text(_CONFIGURATION)
    (start / "modeling_toy.py").write_text(_MODELING)
    auto_map = {"AutoConfig": "configuration_toy.ToyConfig", "AutoModel": "modeling_toy.ToyModel"}
    (start / "config.json").write_text(json.dumps({"model_type": "toy-own-code", "auto_map": auto_map}))
    config = transformers.AutoConfig.from_pretrained(start, trust_remote_code=True)
    model = transformers.AutoModel.from_config(config, trust_remote_code=True)
    chain = Chain(MemoryStore("memory://own-code"))
    with PublishSession(chain, PublishSettings()) as session:
        session.start(model)
    write_checkpoint(chain, 0, tmp_path / "pulled")
    model.save_pretrained(tmp_path / "saved")
    assert _small_files(tmp_path / "pulled").keys() == _small_files(tmp_path / "saved").keys()
    loaded = transformers.AutoModel.from_pretrained(tmp_path / "pulled", trust_remote_code=True)
    assert torch.equal(loaded.out.weight, model.out.weight)


def _changed_temperature(model: Any, tokenizer: Any) -> str:
    model.generation_config.temperature, model.generation_config.do_sample = 0.5, True
    return "generation_config.json"


def _changed_template(model: Any, tokenizer: Any) -> str:
    tokenizer.chat_template = "another {{ messages }}"
    return "chat_template.jinja"


def _added_token(model: Any, tokenizer: Any) -> str:
    tokenizer.add_special_tokens({"additional_special_tokens": ["<tool>"]})
    return "tokenizer.json"


def _changed_config(model: Any, tokenizer: Any) -> str:
    model.config.sliding_window = 7
    return "config.json"


@pytest.mark.parametrize("change", [_changed_temperature, _changed_template, _added_token, _changed_config])
def test_the_next_version_has_what_changed_in_training(change: Any) -> None:
    model, tokenizer, chain = _model(), _tokenizer(), Chain(MemoryStore("memory://changed"))
    with PublishSession(chain, PublishSettings()) as session:
        session.start(model, tokenizer)
        session.sync(1)
        name = change(model, tokenizer)
        session.sync(2)
        session.sync(3)
        session.flush()
    found = [manifest.assets for manifest in chain.manifests()]
    assert found[0] == found[1] != found[2] == found[3]
    before, after = ({a.name: a.sha256 for a in assets_of(chain, version)} for version in (1, 3))
    assert name in {n for n, sha256 in after.items() if before.get(n) != sha256}


def test_what_only_looks_different_is_no_change(caplog: pytest.LogCaptureFixture) -> None:
    model, tokenizer, chain = _model(), _tokenizer(), Chain(MemoryStore("memory://looks"))
    held = upload_assets(chain.store, model, tokenizer)
    tokenizer.init_kwargs["local_files_only"] = False
    tokenizer("t1 t2 t3", truncation=True, max_length=2)
    assert upload_assets(chain.store, model, tokenizer, held) == held


def test_saving_a_checkpoint_in_training_makes_no_version(tmp_path: Path) -> None:
    """`save_pretrained` writes the dtype of the weights into the config of the model at hand."""
    model, chain = _model().to(torch.bfloat16), Chain(MemoryStore("memory://dtype"))
    model.config.dtype = None
    with PublishSession(chain, PublishSettings()) as session:
        session.start(model)
        model.save_pretrained(tmp_path / "saved")
        assert model.config.dtype == "bfloat16"
        mark = session.settle(1)
    assert mark is not None
    assert (mark.version, chain.tip_version()) == (0, 0)
    write_checkpoint(chain, 0, tmp_path / "pulled")
    assert _small_files(tmp_path / "pulled") == _small_files(tmp_path / "saved")


def test_files_that_cannot_be_saved_do_not_stop_the_weights(caplog: pytest.LogCaptureFixture) -> None:
    model, chain = _model(), Chain(MemoryStore("memory://broken"))
    files = ModelFiles(chain, model, None)
    assert files.changed(model) == ()
    model.generation_config.do_sample, model.generation_config.temperature = False, 0.5
    model.generation_config.max_new_tokens = -1
    assert files.changed(model) == ()
    assert "versions keep the old" in caplog.text
    model.generation_config = transformers.GenerationConfig(max_new_tokens=3)
    assert "generation_config.json" in {asset.name for asset in files.changed(model)}
    assert files.changed(model) == ()


def test_the_collators_tokenizer_is_saved_where_the_trainer_has_no_other() -> None:
    tokenizer = object()
    collator = SimpleNamespace(tokenizer=tokenizer)
    assert processing_class_of({"train_dataloader": SimpleNamespace(collate_fn=collator)}) is tokenizer
    wrapped = SimpleNamespace(data_collator=collator)
    assert processing_class_of({"train_dataloader": SimpleNamespace(collate_fn=wrapped)}) is tokenizer
    assert processing_class_of({"processing_class": 1, "train_dataloader": SimpleNamespace(collate_fn=wrapped)}) == 1
    assert processing_class_of({}) is None
