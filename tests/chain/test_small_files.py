"""Small files of a checkpoint: which belong to a version, with which paths, and when two of them say the same."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.utils import filter_repo_objects

from tests.store.racers import write_checkpoint_folder
from weightline.chain.files.assets import upload_file, upload_files
from weightline.chain.files.checkpoint import write_checkpoint
from weightline.chain.files.meaning import have_same_meaning, meaning_of, without_local_keys
from weightline.chain.files.small_files import find_small_files, foreign_patterns
from weightline.chain.read.history import Chain
from weightline.chain.write.standalone import commit_folder, commit_fork, commit_revert
from weightline.chain.write.version import NewVersion
from weightline.errors import InputError
from weightline.store.memory import MemoryStore

#: What the libraries save, and what models have beside it.
_OURS = (
    "LICENSE", "README.md", "1_Pooling/config.json", "2_Dense/model.safetensors", "__init__.py", "added_tokens.json",
    "additional_chat_templates/rag.jinja", "additional_chat_templates/tool use.jinja", "bpe.codes",
    "chat_template.jinja", "config.json", "custom_generate/generate.py", "dict.txt", "emoji.json",
    "generation_config.json", "layers/__init__.py", "layers/deep/attention.py", "merges.txt", "modeling_toy.py",
    "preprocessor_config.json", "processor_config.json", "prophetnet.tokenizer", "qformer_tokenizer/tokenizer.json",
    "qwen.tiktoken", "source.spm", "special_tokens_map.json", "speaker_embeddings/a.npy", "tekken.json",
    "tokenizer.json", "tokenizer.model", "tokenizer.model.v3", "tokenizer_config.json",
    "video_preprocessor_config.json", "vocab.bpe", "vocab.json", "vocab.txt",
)  # fmt: skip

#: What belongs to no version, as it is named.
_FOREIGN = {
    ".cache/huggingface/x.json": ".cache/ (hidden)",
    ".gitattributes": ".gitattributes (hidden)",
    "__pycache__/modeling_toy.cpython-311.pyc": "__pycache__/ (compiled code)",
    "all_results.json": "all_results.json (of a training)",
    "checkpoint-5/config.json": "checkpoint-5/ (a checkpoint of its own)",
    "consolidated.safetensors": "consolidated.safetensors (weights that the index does not name)",
    "events.out.tfevents.1": "events.out.tfevents.1 (a log)",
    "global_step5/mp_rank_00.pt": "global_step5/ (of a training)",
    "layers/.hidden": "layers/.hidden (hidden)",
    "optimizer.pt": "optimizer.pt (of a training)",
    "other/adapter_config.json": "other/ (a checkpoint of its own)",
    "pytorch_model.bin": "pytorch_model.bin (weights of another format)",
    "runs/Nov30/events.out.tfevents.2": "runs/ (logs)",
    "trainer_state.json": "trainer_state.json (of a training)",
    "training_args.bin": "training_args.bin (of a training)",
    "what?.json": "what?.json (a name that no version can have)",
}


def _fill(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{name}\n")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint folder with weights and a config."""
    return write_checkpoint_folder(tmp_path / "checkpoint", 0)


def test_the_pulled_folder_has_every_small_file_at_its_path(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _fill(folder, *(name for name in _OURS if name != "config.json"), *_FOREIGN)
    chain = Chain(MemoryStore("memory://small"))
    with caplog.at_level(logging.WARNING):
        commit_folder(chain, folder)
    assert [record.getMessage() for record in caplog.records] == [
        f"{folder}: left out of the version: {', '.join(sorted(_FOREIGN.values()))}"
    ]
    write_checkpoint(chain, 0, tmp_path / "pulled")
    pulled = {path.relative_to(tmp_path / "pulled").as_posix(): path for path in (tmp_path / "pulled").rglob("*")}
    found = {name for name, path in pulled.items() if path.is_file()}
    assert found == {*_OURS, "model.safetensors", "weightline.json"}
    for name in _OURS:
        assert pulled[name].read_bytes() == (folder / name).read_bytes(), name


def test_the_hubs_client_downloads_what_belongs_to_a_version_and_no_other_formats() -> None:
    kept = set(filter_repo_objects([*_OURS, *_FOREIGN, "model.safetensors"], ignore_patterns=foreign_patterns()))
    # The rest is told apart once it is on disk: by sizes, by the index, and by what lies beside it.
    assert kept == {
        *_OURS, "model.safetensors", "consolidated.safetensors", "other/adapter_config.json", "what?.json",
    }  # fmt: skip


def test_a_fork_and_a_revert_carry_the_paths(folder: Path) -> None:
    _fill(folder, "code/a.py", "vocab.bpe")
    chain, forked = Chain(MemoryStore("memory://one")), Chain(MemoryStore("memory://two"))
    commit_folder(chain, folder)
    (folder / "code" / "a.py").unlink()
    commit_folder(chain, folder)
    assert [asset.name for asset in chain.tip().assets] == ["config.json", "vocab.bpe"]
    assert commit_revert(chain, 0).assets == chain.manifest(0).assets == commit_fork(chain, 0, forked).assets
    assert chain.tip().features == forked.tip().features == (), "paths are part of format 2"
    assert NewVersion.of(chain.tip()).manifest().features == ("asset-paths",)
    assert NewVersion.of(chain.manifest(1)).manifest().features == ()


def test_files_of_the_hubs_cache_are_links(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).rename(tmp_path / "blobs" / name)
        (folder / name).symlink_to(f"../blobs/{name}")
    (tmp_path / "elsewhere").mkdir()
    _fill(tmp_path / "elsewhere", "secret.json")
    (folder / "linked").symlink_to("../elsewhere")
    found = find_small_files(folder, weights=frozenset({"model.safetensors"}))
    assert (found.taken, found.left_out) == (("config.json",), ("linked/ (a link to a folder)",))


def test_whatever_a_library_has_just_saved_belongs_to_the_model(tmp_path: Path) -> None:
    _fill(tmp_path, "vocab.pkl", "words.bin", "a/b.csv")
    assert find_small_files(tmp_path, is_saved=True).taken == ("a/b.csv", "vocab.pkl", "words.bin")


def test_a_folder_of_data_is_refused(tmp_path: Path) -> None:
    _fill(tmp_path, *(f"samples/{number}.json" for number in range(1001)))
    with pytest.raises(InputError, match="more than 1000 small files"):
        find_small_files(tmp_path)


#: Pairs of files that no loader tells apart.
_SAME: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "local_files_only": ("tokenizer_config.json", {"a": 1}, {"a": 1, "local_files_only": True, "is_local": False}),
    "where it lay": ("config.json", {"a": 1, "_name_or_path": "/home/a"}, {"a": 1, "_name_or_path": "org/b"}),
    "a nested config": ("config.json", {"text_config": {"a": 1}}, {"text_config": {"a": 1, "_name_or_path": "x"}}),
    "the release": ("generation_config.json", {"transformers_version": "4.57.0"}, {"transformers_version": "5.24.0"}),
    "a commit": ("preprocessor_config.json", {"_commit_hash": "1"}, {"_commit_hash": "2"}),
    "old name of dtype": ("config.json", {"torch_dtype": "bfloat16"}, {"dtype": "bfloat16"}),
    "order of keys": ("config.json", {"a": 1, "b": 2}, {"b": 2, "a": 1}),
    "spelling of numbers": ("config.json", {"rope_theta": 10000.0}, {"rope_theta": 10000}),
    "an adapter's base": (
        "adapter_config.json",
        {"base_model_name_or_path": "/a", "target_modules": ["q", "v"], "peft_version": "1"},
        {"base_model_name_or_path": "/b", "target_modules": ["v", "q"], "peft_version": "2"},
    ),
    "the last call": ("tokenizer.json", {"truncation": None, "model": {}}, {"truncation": {"max": 1}, "model": {}}),
    "in a folder": ("decoder/tokenizer_config.json", {}, {"local_files_only": True}),
}  # fmt: skip

#: Pairs that they do.
_DIFFERENT: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "a value": ("config.json", {"a": 1}, {"a": 2}),
    "true and one": ("config.json", {"a": True}, {"a": 1}),
    "a list": ("config.json", {"eos_token_id": [1, 2]}, {"eos_token_id": [2, 1]}),
    "a base in another file": ("config.json", {"base_model_name_or_path": "a"}, {"base_model_name_or_path": "b"}),
    "a label": ("config.json", {"id2label": {"is_local": "x"}}, {"id2label": {"is_local": "y"}}),
    "a vocabulary": ("vocab.json", {"local_files_only": 1}, {"local_files_only": 2}),
    "a token": ("tokenizer.json", {"model": {"vocab": {"a": 0}}}, {"model": {"vocab": {"b": 0}}}),
}


@pytest.mark.parametrize("case", _SAME)
def test_files_that_say_the_same(case: str) -> None:
    name, one, other = _SAME[case]
    assert meaning_of(name, json.dumps(one).encode()) == meaning_of(name, json.dumps(other, indent=1).encode())


@pytest.mark.parametrize("case", _DIFFERENT)
def test_files_that_say_different_things(case: str) -> None:
    name, one, other = _DIFFERENT[case]
    assert meaning_of(name, json.dumps(one).encode()) != meaning_of(name, json.dumps(other).encode())


@pytest.mark.parametrize("raw", [b"", b"{", b"[1]", b"\xff", b"[" * 100_000])
def test_what_is_no_json_says_its_bytes(raw: bytes) -> None:
    assert without_local_keys("config.json", raw) == raw
    assert meaning_of("config.json", raw) == meaning_of("vocab.txt", raw)


def test_keys_without_meaning_are_not_written_and_others_stay(folder: Path, tmp_path: Path) -> None:
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"b": "\u00e9", "local_files_only": True, "is_local": True, "a": [1.5, {"name_or_path": "/x"}]})
    )
    (folder / "config.json").write_text('{"transformers_version": "4.57.0",   "id2label": {"0": "is_local"}}')
    chain = Chain(MemoryStore("memory://written"))
    commit_folder(chain, folder)
    write_checkpoint(chain, 0, tmp_path / "pulled")
    assert (tmp_path / "pulled" / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    text = (tmp_path / "pulled" / "tokenizer_config.json").read_text()
    assert list(json.loads(text).items()) == [("b", "\u00e9"), ("a", [1.5, {}])]


def test_a_file_that_says_the_same_is_the_one_that_the_chain_has(folder: Path) -> None:
    store = MemoryStore("memory://same")
    (folder / "config.json").write_text('{"model_type": "toy", "transformers_version": "4.57.0"}')
    held = upload_files(store, folder)
    (folder / "config.json").write_text('{"transformers_version": "5.24.0", "model_type": "toy", "_name_or_path": "x"}')
    assert upload_files(store, folder, held) == held
    (folder / "config.json").write_text('{"model_type": "other"}')
    changed = upload_files(store, folder, held)
    assert changed != held
    assert not have_same_meaning(store, held, changed)


def test_files_of_earlier_releases_compare_by_what_they_say(folder: Path) -> None:
    """Release 0.1 wrote files as they lay. A text for people makes no difference."""
    store = MemoryStore("memory://earlier")
    (first,) = upload_files(store, folder)
    text = json.dumps(json.loads((folder / "config.json").read_text()) | {"local_files_only": True})
    (folder / "config.json").write_text(text)
    as_it_lies = upload_file(store, folder / "config.json", name="config.json")
    _fill(folder, "README.md")
    readme = upload_file(store, folder / "README.md", name="README.md")
    assert first.sha256 != as_it_lies.sha256
    assert have_same_meaning(store, (first,), (readme, as_it_lies))
    assert not have_same_meaning(store, (first,), (readme,))
