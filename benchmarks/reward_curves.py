"""Draws score and reward of GRPO on completions of a replica and on the trainer's own, with the same seeds, as an SVG.

    python -m benchmarks.reward_curves [--seeds 0 1 2] [--work DIR] [--svg docs/images/rollout-rewards.svg]

It trains SFT and DPO of the recipe that ships with weightline once. From that model it trains the recipe's GRPO stage
twice for each seed: as the recipe says, with a replica that follows the chain, and with `rollouts: none`. The score is
exact match of greedy answers on all held-out problems, of every fifth version; the reward is that of training, on other
problems at each step. A stage that DIR holds already is not trained again. It takes a quarter of an hour on two cores.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from weightline.evaluation.evaluate import measure_version
from weightline.evaluation.task import arithmetic_task
from weightline.runs.curves import Point, points_of
from weightline.runs.folder import Run
from weightline.runs.prepare import prepare_run
from weightline.runs.progress import MetricsFollower
from weightline.runs.stage import run_stage
from weightline.stages.arithmetic import write_heldout
from weightline.stages.job import StageResult
from weightline.stages.load import load_recipe
from weightline.stages.model import materialize_model

RECIPE = "arithmetic"
#: What is compared, by its name in the figure. None keeps the recipe's own `rollouts`.
VARIANTS: Mapping[str, str | None] = {"with the loop": None, "without it": "none"}
#: The final reward is the mean of the last steps: that of one step is of too few prompts.
_FINAL_STEPS = 10
_EVALUATED_STEPS = 5
_WIDTH, _PANEL_HEIGHT, _TOP = 640, 240, 28
_LEFT, _RIGHT, _ABOVE, _BELOW = 52, 16, 30, 32
#: These colors are legible on a light page and on a dark one.
_INK, _COLORS = "#7d8590", ("#3b82f6", "#f59e0b")


@dataclass(frozen=True)
class Panel:
    """One diagram: curves by the name of their variant, one for each seed."""

    title: str
    curves: Mapping[str, Sequence[Sequence[Point]]]


def main() -> None:
    """Trains, measures, draws, and prints means over the seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--work", type=Path, help="folder of the trainings; a temporary one by default")
    parser.add_argument("--svg", type=Path, default=Path("docs/images/rollout-rewards.svg"))
    args = parser.parse_args()
    held = nullcontext(args.work) if args.work else tempfile.TemporaryDirectory(prefix="weightline-bench-")
    with held as name:
        folder = Path(name).absolute()
        model_dir = _supervised(folder)
        runs = {
            name: [_optimized(folder, model_dir, seed, rollouts) for seed in args.seeds]
            for name, rollouts in VARIANTS.items()
        }
        scores = {name: [_scores(run, folder) for run in of_seeds] for name, of_seeds in runs.items()}
        rewards = {name: [_rewards(run) for run in of_seeds] for name, of_seeds in runs.items()}
    args.svg.parent.mkdir(parents=True, exist_ok=True)
    args.svg.write_text(figure([Panel("score on held-out problems", scores), Panel("reward in training", rewards)]))
    for name in VARIANTS:
        finals = [final_reward(points) for points in rewards[name]]
        first = statistics.mean(points[0][1] for points in rewards[name])
        last_scores = [points[-1][1] for points in scores[name]]
        print(
            f"{name}: reward {first:.3f} at first, {_listed(finals)} over the last {_FINAL_STEPS} steps; "
            f"score {_mean_of(scores[name])[0][1]:.4f} before, {_listed(last_scores)} after"
        )


def _listed(numbers: Sequence[float]) -> str:
    return f"{statistics.mean(numbers):.4f} ({', '.join(f'{number:.4f}' for number in numbers)})"


def final_reward(points: Sequence[Point]) -> float:
    """Returns the mean reward of the last steps."""
    last = points[-1][0]
    return statistics.mean(reward for step, reward in points if step > last - _FINAL_STEPS)


def _supervised(folder: Path) -> Path:
    """Trains all stages before GRPO, and returns the folder of the model that results."""
    recipe = load_recipe(RECIPE).model_dump(mode="json")
    recipe["stages"] = [stage for stage in recipe["stages"] if stage["kind"] != "grpo"]
    run = _prepared(folder, "supervised", recipe)
    kinds = [stage.kind for stage in run.recipe.stages]
    for kind in kinds:
        _train(run, kind)
    return run.job(kinds[-1]).final_model_dir


def _optimized(folder: Path, model_dir: Path, seed: int, rollouts: str | None) -> Run:
    """Trains GRPO from the model."""
    recipe = load_recipe(RECIPE).model_dump(mode="json")
    (stage,) = (stage for stage in recipe["stages"] if stage["kind"] == "grpo")
    if rollouts is not None:
        stage["rollouts"] = rollouts
    recipe |= {"seed": seed, "stages": [stage], "model": {"path": str(model_dir)}}
    run = _prepared(folder, f"grpo-{rollouts or 'replica'}-{seed}", recipe)
    _train(run, "grpo")
    return run


def _rewards(run: Run) -> list[Point]:
    """Returns the rewards that training logged."""
    metrics = MetricsFollower(run.job("grpo").metrics_path)
    metrics.refresh()
    return points_of(metrics.history, "reward")


def _scores(run: Run, folder: Path) -> list[Point]:
    """Measures every fifth version of the run, and returns the scores by optimizer step."""
    problems = folder / "heldout.jsonl"
    write_heldout(run.recipe.arithmetic, problems)
    chain, task = run.open_chain(), arithmetic_task(problems)
    return [
        (one.global_step, measure_version(chain, one.version, task, folder / "evaluations")["score"])
        for one in chain.manifests()
        if one.global_step % _EVALUATED_STEPS == 0
    ]


def _prepared(folder: Path, run_id: str, recipe: Mapping[str, Any]) -> Run:
    """Returns the run of a recipe, with the model that its first stage starts from."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{run_id}.yaml"
    path.write_text(json.dumps(recipe))  # JSON is YAML
    run = prepare_run(path, folder, run_id)
    if not run.start_model_dir.exists():
        materialize_model(run.recipe.model, run.start_model_dir, run.recipe.seed, run.recipe.dtype)
    return run


def _train(run: Run, kind: str) -> None:
    """Trains a stage, unless it has been trained."""
    job, began = run.job(kind), time.monotonic()
    if StageResult.load(job) is not None:
        return
    job.output_dir.mkdir(parents=True, exist_ok=True)
    run_stage(run, job, {}, show=lambda line: None, tick=lambda: None)
    print(f"{run.run_id}: {kind} trained in {time.monotonic() - began:.0f} s", flush=True)


def figure(panels: Sequence[Panel]) -> str:
    """Returns the panels, one below the other, with a legend: a thin line for each seed, a thick one for the mean."""
    height = _TOP + _PANEL_HEIGHT * len(panels)
    drawn = []
    for number, name in enumerate(VARIANTS):
        at = _LEFT + 150 * number
        drawn.append(f'<path d="M{at},12h20" stroke="{_COLORS[number]}" stroke-width="3"/>')
        drawn.append(_text(at + 26, 16, name))
    for number, panel in enumerate(panels):
        drawn += _panel(panel, _TOP + number * _PANEL_HEIGHT)
    size = f'viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12" fill="{_INK}">'
    return "\n".join([head, *drawn, "</svg>\n"])


def _panel(panel: Panel, top: int) -> list[str]:
    everything = [point for of_seeds in panel.curves.values() for points in of_seeds for point in points]
    last = max(step for step, _ in everything)
    low, high = (end(value for _, value in everything) for end in (min, max))
    ticks = [number / 50 for number in range(math.floor(low * 50), math.ceil(high * 50) + 1)]
    above, below, right = top + _ABOVE, top + _PANEL_HEIGHT - _BELOW, _WIDTH - _RIGHT

    def x(step: float) -> float:
        return _LEFT + step / last * (right - _LEFT)

    def y(value: float) -> float:
        return below - (value - ticks[0]) / (ticks[-1] - ticks[0]) * (below - above)

    def line(points: Sequence[Point], color: str, style: str) -> str:
        path = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in points)
        return f'<polyline points="{path}" fill="none" stroke="{color}" stroke-linejoin="round" {style}/>'

    drawn = [_text(_LEFT, top + 18, panel.title), _text(right, below + 28, "optimizer step", "end")]
    for tick in ticks:
        drawn.append(f'<path d="M{_LEFT},{y(tick):.1f}H{right}" stroke="{_INK}" stroke-opacity="0.25"/>')
        drawn.append(_text(_LEFT - 8, y(tick) + 4, f"{tick:.2f}", "end"))
    drawn += [_text(x(step), below + 16, f"{step:.0f}", "middle") for step in _steps_shown(last)]
    for color, of_seeds in zip(_COLORS, panel.curves.values(), strict=True):
        drawn += [line(points, color, 'stroke-width="1" stroke-opacity="0.45"') for points in of_seeds]
        drawn.append(line(_mean_of(of_seeds), color, 'stroke-width="3"'))
    return drawn


def _steps_shown(last: float) -> range:
    return range(0, int(last) + 1, max(1, round(last / 4)))


def _mean_of(of_seeds: Sequence[Sequence[Point]]) -> list[Point]:
    """Returns the mean over the seeds at each step that all of them logged."""
    rewards = [dict(points) for points in of_seeds]
    steps = sorted(set.intersection(*(set(one) for one in rewards)))
    return [(step, statistics.mean(one[step] for one in rewards)) for step in steps]


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


if __name__ == "__main__":
    main()
