"""The built-in task: addition, as bytes. Deterministic data for SFT, DPO, GRPO and the evaluation. Imports no torch.

A share of the supervised data omits the carry of ten. A model that learns from them adds with that mistake; the
preference pairs and the verifiable reward correct it. So the score improves in each stage, with any seed.

A problem is an ordered pair of operands. The split is made before any data: `num_heldout` problems are drawn, and
every training example of every stage comes from pairs that are not held out in either order (if 12+34 is held out,
34+12 is not used in training either).
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from weightline.errors import RecipeError
from weightline.files import write_atomically
from weightline.stages.recipe import ArithmeticConfig

Problem = tuple[int, int]
Example = dict[str, str]


def question(problem: Problem) -> str:
    """Returns the question of a problem: (12, 34) -> "12+34="."""
    return f"{problem[0]}+{problem[1]}="


def answer(problem: Problem) -> str:
    """Returns the answer of a problem: (12, 34) -> "46"."""
    return str(sum(problem))


def heldout_problems(config: ArithmeticConfig) -> list[Problem]:
    """Returns the problems of the evaluation, in a fixed order. RecipeError when too few remain for training."""
    num_operands = config.max_operand + 1
    if config.num_heldout > num_operands**2 // 4:
        remedy = f"at most {num_operands**2 // 4} with max_operand {config.max_operand}"
        raise RecipeError(
            f"arithmetic.num_heldout: too few problems are left to train on. Remedy: {remedy}.",
            field="arithmetic.num_heldout",
            remedy=remedy,
        )
    draw = random.Random(f"heldout/{config.seed}")
    indices = draw.sample(range(num_operands**2), config.num_heldout)
    return [divmod(index, num_operands) for index in indices]


def training_problems(config: ArithmeticConfig, purpose: str, seed: int) -> Iterator[Problem]:
    """Yields problems that are not held out, without end. (config, purpose, seed) determine the sequence."""
    excluded = {tuple(sorted(problem)) for problem in heldout_problems(config)}
    draw = random.Random(f"{purpose}/{seed}")
    while True:
        problem = draw.randint(0, config.max_operand), draw.randint(0, config.max_operand)
        if tuple(sorted(problem)) not in excluded:
            yield problem


def supervised_examples(config: ArithmeticConfig, num_examples: int, seed: int) -> list[Example]:
    """Returns the examples of SFT: prompt and completion, without the carry in `lost_carry_rate` of sums with one."""
    problems = training_problems(config, "sft", seed)
    draw = random.Random(f"teacher/{seed}")
    return [
        {"prompt": question(problem), "completion": str(taught_answer(problem, config.lost_carry_rate, draw))}
        for problem in itertools.islice(problems, num_examples)
    ]


def preference_examples(config: ArithmeticConfig, num_examples: int, seed: int) -> list[Example]:
    """Returns the examples of DPO: the right answer is chosen over one without its carry, or with an invented one."""
    problems = training_problems(config, "dpo", seed)
    return [
        {"prompt": question(problem), "chosen": answer(problem), "rejected": str(wrong_answer(problem))}
        for problem in itertools.islice(problems, num_examples)
    ]


def prompt_examples(config: ArithmeticConfig, num_examples: int, seed: int) -> list[Example]:
    """Returns the examples of GRPO: the prompt, and the answer against which the reward compares."""
    problems = training_problems(config, "grpo", seed)
    return [
        {"prompt": question(problem), "answer": answer(problem)} for problem in itertools.islice(problems, num_examples)
    ]


def has_carry(problem: Problem) -> bool:
    """Returns whether the units of the operands add up to ten or more."""
    return problem[0] % 10 + problem[1] % 10 >= 10


def taught_answer(problem: Problem, lost_carry_rate: float, draw: random.Random) -> int:
    """Returns the sum, or with probability `lost_carry_rate` ten less, if there is a carry."""
    forgets = has_carry(problem) and draw.random() < lost_carry_rate
    return sum(problem) - 10 * forgets


def wrong_answer(problem: Problem) -> int:
    """Returns the rejected answer: without the carry if there is one, else with an invented one.

    Both kinds are needed: with lost carries alone, a model soon carries everywhere.
    """
    return sum(problem) + (-10 if has_carry(problem) else 10)


def exact_match_reward(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    """Returns the rewards for TRL: 1.0 for each completion that equals the answer, else 0.0."""
    return [float(completion.strip() == right) for completion, right in zip(completions, answer, strict=True)]


def write_heldout(config: ArithmeticConfig, path: Path) -> int:
    """Writes the evaluation problems as JSON lines {question, answer}. Returns their number. Atomic, safe to repeat."""
    problems = heldout_problems(config)
    lines = [json.dumps({"question": question(problem), "answer": answer(problem)}) for problem in problems]
    write_atomically(path, "\n".join(lines) + "\n")
    return len(problems)
