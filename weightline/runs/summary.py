"""The results of a run, from its bucket and folder, as summary.json and as a table for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Self

from rich.box import SIMPLE_HEAD
from rich.table import Table

from weightline.chain import Chain
from weightline.files import write_atomically
from weightline.lineage.rows import LineageRow
from weightline.lineage.samples import read_samples
from weightline.lineage.table import COLUMNS, cells
from weightline.runs.curves import points_of
from weightline.runs.folder import Run
from weightline.runs.progress import MetricsFollower
from weightline.runs.stage import read_proof
from weightline.stages.job import StageResult
from weightline.stages.recipe import FrozenModel, Recipe

_STALENESS = "rollout/staleness_max"
#: The first steps of a stage that may be trained on samples of the newest version: those before lookahead sets in.
_MAX_RECORDS_READ = 8


class RatioSummary(FrozenModel):
    """The importance sampling ratio of one optimizer step, over all tokens that it was trained on."""

    global_step: int
    mean: float
    min: float
    max: float


class RolloutsSummary(FrozenModel):
    """What a stage measured that learned from samples of replicas."""

    rewards: tuple[tuple[int, float], ...]
    """The first and the last reward that were logged, each with its optimizer step."""
    on_policy_ratio: RatioSummary | None
    """The ratio of the stage's first step whose samples all had staleness 0. None where no record says it."""


class StageSummary(FrozenModel):
    """The results of one stage. Values are None for a stage that has not finished."""

    last_version: int | None
    is_bit_equal: bool
    """True when that version was proved bit-equal to the trainer's saved files."""
    score: float | None
    global_step: int | None
    train_seconds: float | None
    metrics: dict[str, float]
    """The last logged numbers."""
    rollouts: RolloutsSummary | None = None
    """None for a stage whose samples the trainer made, or that has none."""


class VersionSummary(FrozenModel):
    """One version: the fields of its LineageRow, except those that only graphs need."""

    version: int
    stage: str
    kind: str
    global_step: int
    is_milestone: bool
    num_changed: int
    num_elements: int
    payload_nbytes: int
    full_nbytes: int
    evaluation: str
    score: float | None
    serving: str
    served_at: str | None
    pause_seconds: float | None

    @classmethod
    def of(cls, row: LineageRow) -> Self:
        return cls(**{name: getattr(row, name) for name in cls.model_fields})


class RunSummary(FrozenModel):
    """The contents of summary.json."""

    run_id: str
    chain: str
    recipe: Recipe
    device: str
    num_processes: int
    prefect_ui: str
    seconds: float
    start_score: float | None
    """Score of version 0."""
    stages: dict[str, StageSummary]
    versions: tuple[VersionSummary, ...]
    """Oldest first."""


def write_summary(run: Run, rows: Sequence[LineageRow], ui_url: str, seconds: float) -> RunSummary:
    """Writes summary.json by one rename and returns its contents. Safe to repeat."""
    summary = RunSummary(
        run_id=run.run_id,
        chain=run.chain_url,
        recipe=run.recipe,
        device=run.placement.device,
        num_processes=run.placement.num_processes,
        prefect_ui=ui_url,
        seconds=round(seconds, 1),
        start_score=next((row.score for row in rows if row.version == 0), None),
        stages={stage.kind: _stage_summary(run, stage.kind, rows) for stage in run.recipe.stages},
        versions=tuple(VersionSummary.of(row) for row in rows),
    )
    write_atomically(run.summary_path, summary.model_dump_json(indent=1))
    return summary


def _stage_summary(run: Run, kind: str, rows: Sequence[LineageRow]) -> StageSummary:
    result, proof = StageResult.load(run.job(kind)), read_proof(run, kind)
    scores = {row.version: row.score for row in rows}
    return StageSummary(
        last_version=proof.version if proof else None,
        is_bit_equal=proof.is_bit_equal if proof else False,
        score=scores.get(proof.version) if proof else None,
        global_step=result.global_step if result else None,
        train_seconds=round(result.train_seconds, 1) if result else None,
        metrics=result.metrics if result else {},
        rollouts=_rollouts_summary(run, kind, rows) if result and _STALENESS in result.metrics else None,
    )


def _rollouts_summary(run: Run, kind: str, rows: Sequence[LineageRow]) -> RolloutsSummary:
    metrics = MetricsFollower(run.job(kind).metrics_path)
    metrics.refresh()
    rewards = [(int(step), reward) for step, reward in points_of(metrics.history, "reward")]
    versions = [row.version for row in rows if (row.stage, row.run_id) == (kind, run.run_id)]
    return RolloutsSummary(
        rewards=(rewards[0], rewards[-1]) if rewards else (),
        on_policy_ratio=_on_policy_ratio(run.open_chain(), versions[:_MAX_RECORDS_READ]),
    )


def _on_policy_ratio(chain: Chain, versions: Sequence[int]) -> RatioSummary | None:
    """Returns the ratio that is recorded beside the first of the versions whose samples all had staleness 0."""
    for version in versions:
        samples, _ = read_samples(chain, version)
        if samples is None or samples.staleness.max != 0:
            continue
        mean, low, high = samples.ratio.mean, samples.ratio.min, samples.ratio.max
        if mean is not None and low is not None and high is not None:
            return RatioSummary(global_step=samples.global_step, mean=mean, min=low, max=high)
    return None


def milestone_rows(rows: Sequence[LineageRow]) -> tuple[LineageRow, ...]:
    """Returns the milestones, and of each stage the first, the last and the earliest best version, in the rows' order.

    A run whose every optimizer step is a version has too many for one table.
    """
    kept = {row.version for row in rows if row.is_milestone}
    for stage in {row.stage for row in rows}:
        own = [row for row in rows if row.stage == stage]
        scored = [(row.score, -row.version) for row in own if row.score is not None]
        kept |= {own[0].version, own[-1].version} | ({-max(scored)[1]} if scored else set())
    return tuple(row for row in rows if row.version in kept)


def count_line(num_shown: int, num_versions: int, chain_url: str) -> str:
    """Returns the line below the table of a run that says how many versions there are and how to list them."""
    shown = "all of them" if num_shown == num_versions else "milestones, and of each stage the first, best and last"
    see = f"weightline log {chain_url} --limit {num_versions}"
    return f"{num_versions} versions, shown: {shown}; {see} lists every one"


def versions_table(rows: Sequence[LineageRow], title: str) -> Table:
    """Returns a table for a terminal, oldest version first."""
    table = Table(title=title, title_justify="left", caption="* milestone", caption_justify="left", box=SIMPLE_HEAD)
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in ("version", "stage", "kind") else "right", no_wrap=True)
    for row in rows:
        table.add_row(*cells(row))
    return table


def stage_lines(summary: RunSummary) -> Iterator[str]:
    """Yields a line for the start and one for each stage: its score, and whether its bits are the chain's.

    A stage that learned from samples of replicas has three lines more: its reward, the importance sampling ratio at
    staleness 0, and what its last steps were trained on.
    """
    yield f"start: score {_score(summary.start_score)}"
    for kind, stage in summary.stages.items():
        equal = "bit-equal" if stage.is_bit_equal else "NOT proved equal"
        version = f"version {stage.last_version}, replayed from the bucket,"
        yield f"{kind}: score {_score(stage.score)}; {version} is {equal} to what trainer.save_model wrote"
        if stage.rollouts is not None:
            for line in _rollout_lines(stage.rollouts, stage.metrics):
                yield f"{kind}: {line}"


def _rollout_lines(rollouts: RolloutsSummary, metrics: Mapping[str, float]) -> Iterator[str]:
    """Yields what a stage on samples of replicas measured. The reward without them is that of another training."""
    if rollouts.rewards:
        shown = ", ".join(f"{reward:.3f} at step {step}" for step, reward in dict(rollouts.rewards).items())
        yield (
            f"reward {shown}, on samples of replicas; docs/rollouts.md shows it beside that of the shipped recipe "
            "without them, for the same seeds"
        )
    ratio = rollouts.on_policy_ratio
    if ratio is not None:
        yield (
            f"importance sampling ratio at staleness 0: {ratio.mean:.5f}, {ratio.min:.5f} to {ratio.max:.5f} (step "
            f"{ratio.global_step}, whose samples the newest version made)"
        )
    name = "sampling/importance_sampling_ratio"
    mean, low, high = (metrics.get(f"{name}/{part}", float("nan")) for part in ("mean", "min", "max"))
    yield (
        f"importance sampling ratio at the last step: {mean:.4f}, {low:.3f} to {high:.3f}, of samples at most "
        f"{metrics[_STALENESS]:.0f} versions old; training stood still for "
        f"{metrics.get('rollout/wait_seconds', float('nan')):.2f} s a batch"
    )


def _score(score: float | None) -> str:
    return "-" if score is None else f"{score:.3f}"
