"""A recipe: the model, the stages that train it, their data, and the evaluation of versions.

A person writes it as YAML, which is parsed once into frozen objects. This module imports no torch, so that a flow or a
command line reads a recipe in milliseconds. `weightline.stages.preflight` checks a parsed recipe against the machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from weightline.dtypes import DtypeSetting
from weightline.errors import RecipeError
from weightline.evaluation.task import ARITHMETIC

StageKind = Literal["sft", "dpo", "grpo"]


class FrozenModel(BaseModel):
    """Base class of configurations: unknown fields are refused, and values cannot change after parsing."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class TinyModelConfig(FrozenModel):
    """Sizes of the built-in Qwen3 with random weights and a byte-level tokenizer."""

    hidden_size: int = Field(default=128, ge=8, multiple_of=2)
    """Width of the residual stream."""
    intermediate_size: int = Field(default=256, ge=8)
    """Width of the gated MLP."""
    num_hidden_layers: int = Field(default=3, ge=1)
    """Transformer blocks."""
    num_attention_heads: int = Field(default=4, ge=1)
    """Query heads."""
    num_key_value_heads: int = Field(default=4, ge=1)
    """Key and value heads; divides `num_attention_heads`."""
    head_dim: int = Field(default=32, ge=2, multiple_of=2)
    """Width of one head."""
    max_position_embeddings: int = Field(default=128, ge=16)
    """Longest sequence in tokens (bytes)."""
    rope_theta: float = Field(default=10_000.0, gt=0)
    """Base of the rotary position frequencies."""
    initializer_range: float = Field(default=0.02, gt=0)
    """Standard deviation of the initial weights."""

    @model_validator(mode="after")
    def key_value_heads_divide_the_query_heads(self) -> Self:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError("num_key_value_heads must divide num_attention_heads")
        return self


class ModelConfig(FrozenModel):
    """The model that the first stage starts from: exactly one of `path`, `chain` and `tiny`."""

    path: str | None = Field(default=None, min_length=1)
    """A local folder (config.json, *.safetensors, tokenizer) or a Hub id."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""
    chain: str | None = Field(default=None, min_length=1)
    """URL of a chain: start from one of its versions."""
    version: str = Field(default="tip", min_length=1, coerce_numbers_to_str=True)
    """With `chain`: a number, `tip`, or the name of a ref."""
    tiny: TinyModelConfig | None = None
    """Build the small Qwen3 instead of loading a model."""

    @model_validator(mode="after")
    def exactly_one_of_path_chain_and_tiny(self) -> Self:
        if sum(given is not None for given in (self.path, self.chain, self.tiny)) != 1:
            raise ValueError(
                "give exactly one of `path` (a folder or a Hub id), `chain` (a chain's URL) and `tiny` (sizes of the "
                "built-in)"
            )
        if self.chain is None and self.version != "tip":
            raise ValueError("`version` goes with `chain`")
        return self


class DatasetConfig(FrozenModel):
    """The examples of one stage, in TRL's formats: prompt+completion, prompt+chosen+rejected, or prompt."""

    path: str = Field(default=ARITHMETIC, min_length=1)
    """`arithmetic` (built in), a local .jsonl/.json/.parquet/.csv file or folder, or a Hub id."""
    name: str | None = None
    """Configuration (subset) of a Hub dataset."""
    split: str = "train"
    """Split of a Hub or local dataset."""
    num_examples: int | None = Field(default=None, ge=1)
    """Number of examples: to generate, or to take from the start of a dataset. None: all of a dataset."""

    @property
    def is_arithmetic(self) -> bool:
        return self.path == ARITHMETIC


class ArithmeticConfig(FrozenModel):
    """The built-in task: every problem belongs either to training or to the held-out set, never to both."""

    max_operand: int = Field(default=99, ge=9, le=9999)
    """Operands are 0..max_operand."""
    num_heldout: int = Field(default=400, ge=1)
    """Problems kept for evaluation, drawn from all problems before any training data is made."""
    lost_carry_rate: float = Field(default=0.35, ge=0, le=1)
    """Share of the sums with a carry that the supervised data get wrong. Preferences and rewards correct them."""
    seed: int = Field(default=0, ge=0)
    """Seed of the held-out problems. Separate from `Recipe.seed`, so that runs with different seeds are comparable."""


class RolloutsConfig(FrozenModel):
    """Completions for GRPO from replicas that follow the chain, instead of the trainer's own."""

    lookahead: int = Field(default=1, ge=0)
    """Generation batches that are asked for before training needs them."""
    staleness: int = Field(default=2, ge=0)
    """Greatest age in versions of the weights that wrote a completion, when it is trained on. 0: exactly on policy."""
    replicas: Literal["local", "follow"] | tuple[str, ...] = "follow"
    """`follow`: those that have a lease in the bucket. `local`: one that the stage starts on this machine. Or URLs."""
    mixing: Literal["deny", "allow"] = "deny"
    """Whether one completion may go on while its replica moves to another version."""
    deadline_seconds: float = Field(default=600.0, gt=0)
    """Longest wait for a completion, after which the stage fails."""
    rollout: str | None = Field(default=None, pattern=r"^[\w.]+:\w+$")
    """`module:function` of an episode with several turns. None: one completion for each prompt."""

    @field_validator("replicas", mode="before")
    @classmethod
    def replicas_are_named(cls, given: Any) -> Any:
        if given in ("local", "follow"):
            return given
        if not isinstance(given, list | tuple) or not given:
            raise ValueError("give `local`, `follow`, or a list of URLs")
        for url in given:
            if not isinstance(url, str) or not url.partition("://")[2] or not url.startswith(("http://", "https://")):
                raise ValueError(f"{url!r} is not the http(s) URL of a replica")
        return tuple(given)


class StageConfig(FrozenModel):
    """One training stage: SFT, DPO or GRPO by TRL on DeepSpeed ZeRO-3."""

    kind: StageKind
    """Kind of trainer: sft, dpo or grpo."""
    dataset: DatasetConfig = DatasetConfig()
    """Training examples of the stage."""
    max_steps: int = Field(ge=1)
    """Optimizer steps."""
    learning_rate: float = Field(gt=0)
    """Peak learning rate."""
    per_device_batch_size: int = Field(default=8, ge=1)
    """Examples per rank and micro-batch; for GRPO completions, in groups of `num_generations`."""
    sync_steps: int = Field(default=10, ge=1)
    """Optimizer steps between two committed versions. Default: the recipe's `sync_steps`."""
    save_steps: int = Field(default=50, ge=1)
    """Optimizer steps between two checkpoints to resume from."""
    reward: str | None = Field(default=None, pattern=r"^[\w.]+:\w+$")
    """GRPO only: `module:function` of a TRL reward function. The arithmetic data have a built-in one."""
    rollouts: RolloutsConfig | None = None
    """GRPO only: where completions come from. None (or `none`): the trainer generates them itself."""
    trainer_args: dict[str, Any] = {}
    """Further fields of TRL's SFTConfig, DPOConfig or GRPOConfig, passed through by name."""

    @field_validator("rollouts", mode="before")
    @classmethod
    def none_is_a_word(cls, given: Any) -> Any:
        return None if given == "none" else given

    @model_validator(mode="after")
    def rollouts_belong_to_grpo(self) -> Self:
        if self.rollouts is not None and self.kind != "grpo":
            raise ValueError("`rollouts` is for grpo only")
        return self

    @model_validator(mode="after")
    def reward_belongs_to_grpo(self) -> Self:
        if self.reward is not None and self.kind != "grpo":
            raise ValueError("`reward` is for grpo only")
        if self.kind == "grpo" and self.reward is None and not self.dataset.is_arithmetic:
            raise ValueError("grpo on your own dataset needs `reward: module:function`")
        return self


class EvaluationConfig(FrozenModel):
    """The evaluation of each version by lm-evaluation-harness."""

    task: str = ARITHMETIC
    """`arithmetic` (held-out problems of the built-in data) or the name of a task that the harness finds."""
    include_path: str | None = None
    """Folder with further task YAML files."""
    limit: int | None = Field(default=200, ge=1)
    """Problems per evaluation. None: all."""
    batch_size: int = Field(default=64, ge=1)
    """Prompts generated together."""


class Recipe(FrozenModel):
    """All settings of a run except the URL of its bucket."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")]
    """Short name; part of the chain's name."""
    seed: int = Field(default=0, ge=0, le=2**31 - 1)
    """Seed of model initialization, data order and sampling."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` uses GPUs if there are enough for the ranks, else the CPU."""
    num_processes: int | None = Field(default=None, ge=1)
    """Number of ranks, over which ZeRO-3 partitions the model. None: one per visible GPU, or two on the CPU."""
    num_machines: int = Field(default=1, ge=1)
    """Machines that train together and share a disk; `num_processes` counts the ranks of all of them."""
    sync_steps: int = Field(default=10, ge=1)
    """Default of `stages[].sync_steps`."""
    model: ModelConfig
    """Model that training starts from."""
    dtype: DtypeSetting = "auto"
    """Dtype of the weights. `auto` and `held` keep what the start model holds. bfloat16, float16 or float32 casts the
    start model, except for what its architecture keeps in float32, and is the dtype of the versions. Training computes
    in bf16 where the weights are bf16, and else in float32."""
    arithmetic: ArithmeticConfig = ArithmeticConfig()
    """The built-in data, used by stages and evaluations that name `arithmetic`."""
    stages: tuple[StageConfig, ...] = Field(min_length=1)
    """Stages in order; each starts from the last version of the one before."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Evaluation of versions."""

    @model_validator(mode="before")
    @classmethod
    def stages_inherit_sync_steps(cls, raw: Any) -> Any:
        if not isinstance(raw, dict) or "sync_steps" not in raw or not isinstance(raw.get("stages"), list | tuple):
            return raw
        default = {"sync_steps": raw["sync_steps"]}
        return raw | {"stages": [default | stage if isinstance(stage, dict) else stage for stage in raw["stages"]]}

    @model_validator(mode="after")
    def each_kind_once(self) -> Self:
        kinds = [stage.kind for stage in self.stages]
        if len(set(kinds)) != len(kinds):
            raise ValueError("each kind of stage may occur once; name further runs with a recipe of their own")
        return self

    def choose(self, kinds: Sequence[StageKind] = (), model: ModelConfig | None = None) -> Recipe:
        """Returns the recipe with only these stages (none named: all), in its own order, and with this start model.

        RecipeError for a stage that the recipe lacks. Pure.
        """
        have = [stage.kind for stage in self.stages]
        for kind in kinds:
            if kind not in have:
                raise RecipeError(
                    f"stages: the recipe {self.name} has no stage {kind!r}. Remedy: choose among {', '.join(have)}.",
                    field="stages", remedy=f"choose among {', '.join(have)}",
                )  # fmt: skip
        stages = tuple(stage for stage in self.stages if not kinds or stage.kind in kinds)
        return self.model_copy(update={"stages": stages, "model": model or self.model})


def parse_start(text: str) -> ModelConfig:
    """Parses a start model: a Hub id, a folder, or a version of a chain, as in URL@12 or URL@tip. Pure."""
    if "://" not in text:
        return ModelConfig(path=text)
    url, at, version = text.rpartition("@")
    return ModelConfig(chain=url, version=version) if at and "/" not in version else ModelConfig(chain=text)
