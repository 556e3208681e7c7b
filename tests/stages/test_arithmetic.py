"""The built-in data: deterministic, right where it claims to be, and never an evaluation problem in training."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import pytest

from weightline.errors import RecipeError
from weightline.stages import arithmetic
from weightline.stages.recipe import ArithmeticConfig

CONFIG = ArithmeticConfig(max_operand=19, num_heldout=50, lost_carry_rate=0.5)
MAKERS = (arithmetic.supervised_examples, arithmetic.preference_examples, arithmetic.prompt_examples)


def operands(prompt: str) -> tuple[int, int]:
    left, right = prompt.removesuffix("=").split("+")
    return int(left), int(right)


@pytest.mark.parametrize("make", MAKERS)
def test_no_evaluation_problem_occurs_in_training(make: object) -> None:
    heldout = {frozenset(problem) for problem in arithmetic.heldout_problems(CONFIG)}
    trained = {frozenset(operands(example["prompt"])) for example in make(CONFIG, 20_000, 3)}  # type: ignore[operator]
    assert not heldout & trained
    # The other half of the proof: training does reach every problem that is not held out.
    everything = {frozenset(pair) for pair in itertools.product(range(20), repeat=2)}
    assert trained == everything - heldout


@pytest.mark.parametrize("make", MAKERS)
def test_one_seed_one_dataset(make: object) -> None:
    assert make(CONFIG, 100, 3) == make(CONFIG, 100, 3)  # type: ignore[operator]
    assert make(CONFIG, 100, 3) != make(CONFIG, 100, 4)  # type: ignore[operator]
    assert make(CONFIG, 50, 3) == make(CONFIG, 100, 3)[:50]  # type: ignore[operator]


def test_heldout_problems_do_not_depend_on_the_rate() -> None:
    assert arithmetic.heldout_problems(CONFIG) == arithmetic.heldout_problems(
        CONFIG.model_copy(update={"lost_carry_rate": 0.0})
    )


def test_the_teacher_forgets_the_carry_as_often_as_configured() -> None:
    examples = arithmetic.supervised_examples(CONFIG, 4000, 0)
    with_carry = [example for example in examples if arithmetic.has_carry(operands(example["prompt"]))]
    errors = [sum(operands(example["prompt"])) - int(example["completion"]) for example in examples]
    assert set(errors) == {0, 10}
    assert 0.45 < errors.count(10) / len(with_carry) < 0.55


def test_preferences_choose_the_right_answer_over_a_wrong_carry() -> None:
    for example in arithmetic.preference_examples(CONFIG, 500, 0):
        total = sum(operands(example["prompt"]))
        lost = arithmetic.has_carry(operands(example["prompt"]))
        assert example["chosen"] == str(total)
        assert example["rejected"] == str(total - 10 if lost else total + 10)


def test_prompts_carry_the_answer_that_the_reward_verifies() -> None:
    examples = arithmetic.prompt_examples(CONFIG, 50, 0)
    right = [example["answer"] for example in examples]
    assert right == [str(sum(operands(example["prompt"]))) for example in examples]
    assert arithmetic.exact_match_reward(right, answer=right, prompts=None) == [1.0] * 50
    assert arithmetic.exact_match_reward(["7", "70", "", " 7\n"], answer=["7"] * 4) == [1.0, 0.0, 0.0, 1.0]


def test_the_heldout_file(tmp_path: Path) -> None:
    path = tmp_path / "data" / "heldout.jsonl"
    assert arithmetic.write_heldout(CONFIG, path) == 50
    first = path.read_bytes()
    arithmetic.write_heldout(CONFIG, path)
    assert path.read_bytes() == first
    records = [json.loads(line) for line in first.splitlines()]
    assert len({record["question"] for record in records}) == 50
    assert all(int(record["answer"]) == sum(operands(record["question"])) for record in records)
    assert list(path.parent.iterdir()) == [path]


def test_holding_out_too_much_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"arithmetic\.num_heldout"):
        arithmetic.heldout_problems(ArithmeticConfig(max_operand=9, num_heldout=26))


def test_a_wrong_answer_is_never_right() -> None:
    draw = random.Random(0)
    for problem in itertools.product(range(20), repeat=2):
        assert arithmetic.wrong_answer(problem) not in (sum(problem), -1)
        assert arithmetic.taught_answer(problem, 0.0, draw) == sum(problem)
