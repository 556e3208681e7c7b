"""The tiny model and its tokenizer, and computing in fp32 with bf16 weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.serving.model_chains import assert_same_bits, make_chain, state_of
from weightline.dtypes import DtypeSetting
from weightline.errors import RecipeError
from weightline.serving.engines.float32 import compute_in_float32
from weightline.stages.model import VOCAB_SIZE, build_byte_tokenizer, build_tiny_model, materialize_model
from weightline.stages.recipe import ModelConfig, TinyModelConfig

TINY = TinyModelConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, head_dim=16,
                       num_key_value_heads=1)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return materialize_model(ModelConfig(tiny=TINY), tmp_path_factory.mktemp("model"), seed=1)


def bits(path: Path) -> dict[str, bytes]:
    return {name: tensor.view(torch.int16).numpy().tobytes() for name, tensor in load_file(path).items()}


def test_the_folder_is_bf16_and_one_seed_gives_the_same_bits(folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert "lm_head.weight" not in tensors  # tied
    same = materialize_model(ModelConfig(tiny=TINY), tmp_path / "same", seed=1)
    other = materialize_model(ModelConfig(tiny=TINY), tmp_path / "other", seed=2)
    assert bits(same / "model.safetensors") == bits(folder / "model.safetensors")
    assert bits(other / "model.safetensors") != bits(folder / "model.safetensors")


def test_a_folder_as_the_recipes_model_gives_the_same_bits(folder: Path, tmp_path: Path) -> None:
    copy = materialize_model(ModelConfig(path=str(folder)), tmp_path / "copy", seed=9)
    assert bits(copy / "model.safetensors") == bits(folder / "model.safetensors")
    assert AutoTokenizer.from_pretrained(copy)("1+1=")["input_ids"] == [49, 43, 49, 61]


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"model\.path"):
        materialize_model(ModelConfig(path=str(tmp_path)), tmp_path / "out", seed=0)


def test_the_tokenizer_is_the_bytes(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "12+34=46\n \t caf\u00e9 \U0001f600 a  b"
    ids = tokenizer(text)["input_ids"]
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == text
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, len(tokenizer)) == (256, 257, VOCAB_SIZE)
    padded = tokenizer(["1", "123"], padding=True)
    assert padded["input_ids"][0].count(257) == 2


def test_the_model_knows_where_a_text_ends(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    assert (model.config.eos_token_id, model.config.pad_token_id) == (256, 257)
    assert model.generation_config.eos_token_id == 256


def test_building_leaves_the_random_state_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    build_tiny_model(TINY, seed=0)
    assert torch.equal(torch.rand(3), expected)


def test_float32_compute_equals_a_float32_model_bit_for_bit() -> None:
    ids = torch.tensor([list(b"12+34=")])
    stored = build_tiny_model(TINY, seed=0)
    widened = build_tiny_model(TINY, seed=0).float()
    names = [name for name, _ in stored.named_parameters()]
    assert compute_in_float32(stored)
    assert compute_in_float32(stored)  # safe to repeat
    assert [name for name, _ in stored.named_parameters()] == names
    assert {parameter.dtype for parameter in stored.parameters()} == {torch.bfloat16}
    assert torch.equal(stored(ids).logits, widened(ids).logits)
    stored(ids).logits.sum().backward()
    assert {parameter.grad.dtype for parameter in stored.parameters() if parameter.grad is not None} == {torch.bfloat16}


def test_float32_compute_leaves_unknown_modules_alone() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LayerNorm(2)).bfloat16()
    assert not compute_in_float32(model)
    assert type(model[0]) is torch.nn.Linear


def test_a_version_of_a_chain_is_a_start_model_with_its_very_bits(tmp_path: Path) -> None:
    made = make_chain((tmp_path / "chain").as_uri(), num_versions=2)
    folder = materialize_model(ModelConfig(chain=made.chain.url, version="0"), tmp_path / "start", seed=0)
    assert_same_bits(state_of(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)), made.states[0])
    assert AutoTokenizer.from_pretrained(folder)("1+1=")["input_ids"] == list(b"1+1=")


def _saved(folder: Path, dtype: torch.dtype, **options: Any) -> Path:
    build_tiny_model(TINY, seed=3).to(dtype).save_pretrained(folder, **options)
    build_byte_tokenizer(64).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("max_shard_size", ["5GB", "8KB"])
def test_a_wider_model_is_cast_file_by_file(tmp_path: Path, max_shard_size: str) -> None:
    """The bits are those that loading and casting the whole model gives; the shards stay as they are."""
    source = _saved(tmp_path / "fp32", torch.float32, max_shard_size=max_shard_size)
    taken = materialize_model(ModelConfig(path=str(source)), tmp_path / "taken", seed=0, dtype="bfloat16")
    assert sorted(p.name for p in taken.glob("*.safetensors*")) == sorted(p.name for p in source.glob("*.safetensors*"))
    whole = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(taken)
    assert model.dtype == torch.bfloat16
    assert_same_bits(state_of(model), state_of(whole))


def test_a_bf16_model_is_linked_and_its_source_stays_whole(tmp_path: Path) -> None:
    source = _saved(tmp_path / "bf16", torch.bfloat16)
    before = (source / "model.safetensors").read_bytes()
    for _ in range(2):  # safe to repeat
        taken = materialize_model(ModelConfig(path=str(source)), tmp_path / "taken", seed=0)
    assert (taken / "model.safetensors").read_bytes() == before
    assert (source / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_the_start_model_has_every_small_file_at_its_path(
    dtype: DtypeSetting, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = _saved(tmp_path / "hub", torch.float32, max_shard_size="8KB")
    ours = {
        "additional_chat_templates/rag.jinja", "custom_generate/generate.py", "layers/deep/attention.py",
        "modeling_toy.py", "vocab.bpe", "model.safetensors.index.json",
    }  # fmt: skip
    foreign = {"checkpoint-5/config.json", "optimizer.pt", "consolidated.safetensors", "weightline.json"}
    for name in ours | foreign:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        if not (source / name).exists():
            (source / name).write_text(f"{name}\n")
    before = {path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()}
    taken = materialize_model(ModelConfig(path=str(source)), tmp_path / "start", 0, dtype)
    found = {path.relative_to(taken).as_posix() for path in taken.rglob("*") if path.is_file()}
    assert found == before - foreign
    assert all((taken / name).read_bytes() == (source / name).read_bytes() for name in ours)
    assert (
        f"{source}: left out of the start model: checkpoint-5/ (a checkpoint of its own), "
        "consolidated.safetensors (weights that the index does not name), optimizer.pt (of a training)"
    ) in caplog.messages
    wanted = torch.float32 if dtype == "auto" else torch.bfloat16
    assert AutoModelForCausalLM.from_pretrained(taken).dtype == wanted


def test_a_model_in_another_format_keeps_its_files(tmp_path: Path) -> None:
    source = _saved(tmp_path / "hub", torch.bfloat16)
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    torch.save(tensors, source / "pytorch_model.bin")
    (source / "layers").mkdir()
    (source / "layers" / "attention.py").write_text("x = 1\n")
    taken = materialize_model(ModelConfig(path=str(source)), tmp_path / "start", seed=0)
    assert bits(taken / "model.safetensors") == {n: t.view(torch.int16).numpy().tobytes() for n, t in tensors.items()}
    assert (taken / "layers" / "attention.py").read_text() == "x = 1\n"
    assert not (taken / "pytorch_model.bin").exists()


def test_a_folder_with_something_else_is_refused_before_anything_is_copied(tmp_path: Path) -> None:
    source = _saved(tmp_path / "broken", torch.bfloat16)
    (source / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(RecipeError, match=r"model\.path"):
        materialize_model(ModelConfig(path=str(source)), tmp_path / "taken", seed=0)
    assert not (tmp_path / "taken").exists()
