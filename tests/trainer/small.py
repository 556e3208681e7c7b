"""A trainer of transformers with a model so small that a test can train it, and what a chain holds of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import Qwen3Config, Qwen3ForCausalLM, Trainer, TrainerCallback, TrainingArguments

from weightline.chain.read.history import Chain, open_chain
from weightline.chain.replay.state import read_state
from weightline.codec.torch_ops import bits_of
from weightline.naming import checkpoint_tensors

ROWS = [
    {"input_ids": tokens, "labels": tokens} for tokens in ([row + token for token in range(8)] for row in range(16))
]


def small_model() -> Qwen3ForCausalLM:
    """A model with the same weights each time."""
    config = Qwen3Config(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8, dtype="bfloat16",
    )  # fmt: skip
    torch.manual_seed(0)
    return Qwen3ForCausalLM(config).to(torch.bfloat16)


def small_trainer(
    folder: Path,
    *callbacks: TrainerCallback,
    kind: type[Trainer] = Trainer,
    model: Qwen3ForCausalLM | None = None,
    **options: Any,
) -> Trainer:
    """A trainer of four steps. It writes to folder/out. options: of TrainingArguments."""
    defaults: dict[str, Any] = {
        "output_dir": str(folder / "out"), "max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 1e-2,
        "report_to": [], "disable_tqdm": True, "use_cpu": True, "dataloader_pin_memory": False, "save_strategy": "no",
    }  # fmt: skip
    arguments = TrainingArguments(**(defaults | options))
    return kind(model or small_model(), arguments, train_dataset=ROWS, eval_dataset=ROWS[:4], callbacks=list(callbacks))


class Worsening(Trainer):
    """Its evaluations get worse from step to step, so that the first checkpoint is the best one."""

    sign = 1.0

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        metrics = {"eval_loss": self.sign * self.state.global_step}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


class Improving(Worsening):
    """Its evaluations get better from step to step."""

    sign = -1.0


class Editor(TrainerCallback):
    """Changes weights at one event, in one of the ways in which a callback may."""

    def __init__(self, event: str, way: str = "in place") -> None:
        self.way = way
        setattr(self, event, self._edit)

    def _edit(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        weight = model.model.norm.weight
        other = weight.detach() + state.global_step + 1
        if self.way == "in place":
            with torch.no_grad():
                weight.copy_(other)
        elif self.way == "data":
            weight.data = other
        else:
            model.model.norm.weight = torch.nn.Parameter(other)


def bits_of_model(model: Any) -> dict[str, bytes]:
    """The bits of every published tensor of a model on the CPU, by name."""
    held = {t.spec.name: bits_of(t.held.detach().reshape(-1)).tobytes() for t in checkpoint_tensors(model)}
    assert len(held) > 5
    return held


def bits_of_version(chain: Chain, version: int) -> dict[str, bytes]:
    """The bits of every tensor of a version, by name."""
    return {name: bits.tobytes() for name, bits in read_state(chain, version).bits.items()}


def bits_of_folder(folder: Path) -> dict[str, bytes]:
    """The bits of every tensor of a checkpoint folder, by name."""
    saved = load_file(folder / "model.safetensors")
    return {name: bits_of(tensor.reshape(-1)).tobytes() for name, tensor in saved.items()}


def assert_ends_at_the_tip(trainer: Trainer, url: str, folder: Path) -> None:
    """The chain's last version is a milestone, and has the bits of the model at hand and of what it saves."""
    chain = open_chain(url)
    tip = chain.tip()
    assert tip.is_milestone
    assert tip.global_step == trainer.state.global_step
    found = bits_of_version(chain, tip.version)
    assert found == bits_of_model(trainer.model)
    trainer.save_model(str(folder))
    assert found == bits_of_folder(folder)
