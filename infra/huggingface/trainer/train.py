"""GRPO on a word game: completions from the replica's Space, marks from the environment's Space, weights by the bucket.

One rank of it: start.sh launches one a GPU. CHAIN and MODEL are variables of the Job.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from weightline import ChainRollouts, WeightlineCallback
from weightline.environments.word_game import play_game, prompts, reward

if TYPE_CHECKING:
    from weightline.rollouts.episode import Session

RULES = (
    "Guess a hidden word of three letters out of a, b, c and d, such as abc. After each guess you see a mark a letter: "
    "+ in its place, - elsewhere in the word, . not in the word. Write nothing but the next guess.\n"
)


def rows(num_games: int) -> list[dict[str, str]]:
    """Returns the dataset: the rules and the number of a game, which is its seed."""
    return [{"prompt": f"{RULES}{row['prompt']} "} for row in prompts(num_games)]


def rollout_of(tokenizer: Any) -> Any:
    """Returns the rollout function for a model with this tokenizer."""

    async def play(session: Session, prompt: str) -> None:
        await play_game(
            session,
            prompt,
            encode=lambda text: tokenizer.encode(text, add_special_tokens=False),
            decode=lambda token_ids: tokenizer.decode(token_ids, skip_special_tokens=True).strip(),
        )

    return play


def main() -> None:
    """Trains until the last step. Each step is a version."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    chain, model = os.environ["CHAIN"], os.environ.get("MODEL", "Qwen/Qwen3-0.6B")
    tokenizer = AutoTokenizer.from_pretrained(model)
    arguments = GRPOConfig(
        output_dir="/tmp/grpo",  # noqa: S108 - the Job's own disk
        max_steps=200,
        learning_rate=1e-6,
        per_device_train_batch_size=16,
        num_generations=8,
        max_completion_length=64,
        bf16=True,
        model_init_kwargs={"dtype": "bfloat16"},
        save_steps=50,
        logging_steps=1,
        report_to=[],
    )
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=arguments,
        train_dataset=Dataset.from_list(rows(4096)),
        processing_class=tokenizer,
    )
    trainer.add_callback(WeightlineCallback(chain, sync_steps=1))
    ChainRollouts(chain, staleness=2, rollout=rollout_of(tokenizer)).attach(trainer)
    trainer.train()


if __name__ == "__main__":
    main()
