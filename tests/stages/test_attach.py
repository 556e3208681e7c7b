"""Attaching rollouts to a trainer of a person's own: what is refused, by name, before anything is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from trl import GRPOConfig, GRPOTrainer

from tests.stages.rewards import share_of_even_bytes
from weightline import ChainRollouts, WeightlineCallback
from weightline.errors import InputError
from weightline.stages.model import materialize_model
from weightline.stages.recipe import ModelConfig, TinyModelConfig

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")  # PEFT's


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tiny = TinyModelConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, head_dim=8)
    return materialize_model(ModelConfig(tiny=tiny), tmp_path_factory.mktemp("model"), seed=0)


def grpo_trainer(model_dir: Path, folder: Path, **options: Any) -> GRPOTrainer:
    defaults: dict[str, Any] = {
        "output_dir": str(folder / "out"), "max_steps": 2, "per_device_train_batch_size": 4, "num_generations": 4,
        "max_completion_length": 4, "report_to": [], "use_cpu": True, "bf16": False, "save_strategy": "no",
        "gradient_checkpointing": None, "activation_checkpointing": False,
    }  # fmt: skip
    rows = [{"prompt": f"{number}="} for number in range(16)]
    return GRPOTrainer(
        model=str(model_dir), args=GRPOConfig(**(defaults | options)), reward_funcs=share_of_even_bytes,
        train_dataset=Dataset.from_list(rows), eval_dataset=Dataset.from_list(rows[:2]),
    )  # fmt: skip


def _url(folder: Path) -> str:
    return f"file://{folder}/bucket/chain"


@pytest.mark.parametrize(
    "field",
    [
        "vllm_importance_sampling_correction",
        "generation_kwargs",
        "per_device_train_batch_size",
        "rollout_func",
        "model",
    ],
)
def test_a_trainer_whose_settings_do_not_go_with_rollouts(field: str, model_dir: Path, tmp_path: Path) -> None:
    options = {
        "vllm_importance_sampling_correction": {"vllm_importance_sampling_correction": False},
        "generation_kwargs": {"generation_kwargs": {"no_repeat_ngram_size": 2}},
        "per_device_train_batch_size": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    }.get(field, {})
    trainer = grpo_trainer(model_dir, tmp_path, **options)
    if field == "per_device_train_batch_size":
        trainer.args.steps_per_generation = 1
    if field == "rollout_func":
        trainer.rollout_func = lambda prompts, trainer: {}
    if field == "model":
        trainer.model = get_peft_model(trainer.model, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(InputError, match=f"^{field} does not go with rollouts") as caught:
        ChainRollouts(_url(tmp_path)).attach(trainer)
    assert caught.value.field == field


@pytest.mark.parametrize("name", ["_step", "_tokenize_prompts", "vllm_generation.generate"])
def test_a_release_of_trl_that_lacks_a_name(
    name: str, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = grpo_trainer(model_dir, tmp_path)
    if name == "_step":
        del trainer._step
    elif name == "_tokenize_prompts":
        monkeypatch.delattr(GRPOTrainer, name)
    else:
        monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", _url)
    with pytest.raises(InputError, match="GRPOTrainer has no `") as caught:
        ChainRollouts(_url(tmp_path)).attach(trainer)
    assert caught.value.facts["attribute"] == ("_last_loaded_step" if "." in name else name)


@pytest.mark.parametrize(
    ("callback", "field"),
    [
        (None, "callbacks"),
        ({"chain": "other"}, "chain_url"),
        ({"on_backlog": "fold"}, "on_backlog"),
        ({"on_publish_error": "skip_and_record"}, "on_publish_error"),
        ({"sync_steps": 2}, "sync_steps"),
        ({"timeout_seconds": 60.0}, "deadline_seconds"),
    ],
)
def test_a_callback_that_does_not_go_with_rollouts_is_refused_before_the_first_step(
    callback: dict[str, Any] | None, field: str, model_dir: Path, tmp_path: Path
) -> None:
    trainer = grpo_trainer(model_dir, tmp_path)
    if callback is not None:
        url = _url(tmp_path) + str(callback.pop("chain", ""))
        trainer.add_callback(WeightlineCallback(url, **callback))
    ChainRollouts(_url(tmp_path), lookahead=0, staleness=0).attach(trainer)
    with pytest.raises(InputError) as caught:
        trainer.train()
    assert caught.value.field == field
    assert trainer.state.global_step == 0


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"staleness": -1}, "staleness"),
        ({"lookahead": -1}, "lookahead"),
        ({"mixing": "maybe"}, "mixing"),
        ({"replicas": "local"}, "replicas"),
        ({"replicas": []}, "replicas"),
        ({"deadline_seconds": 0}, "deadline_seconds"),
        ({"rollout": "no.such:function"}, "rollout"),
    ],
)
def test_a_setting_that_is_none(settings: dict[str, Any], field: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        ChainRollouts(_url(tmp_path), **settings)
    assert caught.value.field == field
