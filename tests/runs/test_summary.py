"""What a run came to, for programs and for people; and how far it is while it goes."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.chains import commit_state, nudged, random_state
from tests.lineage.rows import row
from tests.runs.recipes import write_recipe
from weightline.chain.read.records import EVALUATIONS, REFRESHES, SAMPLES, write_record
from weightline.deployments.stack.pipeline import RunScreen
from weightline.lineage.read import read_lineage
from weightline.rollouts.record import SamplesRecord, Spread
from weightline.runs.folder import Run
from weightline.runs.prepare import prepare_run
from weightline.runs.progress import RunWatch
from weightline.runs.stage import StageProof
from weightline.runs.summary import (
    RunSummary,
    count_line,
    milestone_rows,
    stage_lines,
    versions_table,
    write_summary,
)
from weightline.stages.job import StageResult


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Two versions: one evaluated and passed over, one served and not evaluated yet."""
    run = prepare_run(write_recipe(tmp_path), tmp_path / "runs", "run-1")
    chain = run.open_chain()
    state = random_state(0)
    commit_state(chain, state, is_milestone=True)
    commit_state(chain, nudged(state, 1), state, is_milestone=True)
    write_record(chain, EVALUATIONS, 0, "arithmetic", {"status": "done", "score": 0.25})
    write_record(chain, REFRESHES, 0, "replica-0", {"status": "skipped", "newer_version": 1})
    write_record(chain, REFRESHES, 1, "replica-0", {"status": "done", "served_at": "2026-01-02T03:04:05Z"})
    run.stage_dir("sft").mkdir(parents=True)
    (run.stage_dir("sft") / "metrics.jsonl").write_text('{"step": 3, "loss": 1.5}\n')
    return run


def _text(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_summary_says_all_of_a_run(run: Run) -> None:
    proof = StageProof(version=1, commit_id="0" * 32, is_bit_equal=True, num_tensors=2, num_elements=8)
    run.equality_path("sft").write_text(proof.model_dump_json())
    written = write_summary(run, read_lineage(run.open_chain()), "http://127.0.0.1:4200", 12.34)
    summary = json.loads(run.summary_path.read_text())
    assert RunSummary.model_validate(summary) == written
    first, second = summary["versions"]
    assert first.keys() >= {
        "version", "stage", "kind", "num_changed", "num_elements", "payload_nbytes", "full_nbytes",
        "score", "served_at",
    }  # fmt: skip
    assert (first["version"], first["stage"], first["kind"], first["score"]) == (0, "sft", "anchor", 0.25)
    assert (second["score"], second["served_at"]) == (None, "2026-01-02T03:04:05Z")
    assert (summary["start_score"], summary["seconds"]) == (0.25, 12.3)
    assert summary["stages"]["sft"]["is_bit_equal"] is True
    assert summary["stages"]["sft"]["last_version"] == 1
    assert summary["stages"]["dpo"]["is_bit_equal"] is False
    told = list(stage_lines(written))
    assert told[0] == "start: score 0.250"
    assert "version 1, replayed from the bucket, is bit-equal to what trainer.save_model wrote" in told[1]
    assert "NOT proved equal" in told[2]


def _sampled(staleness: float, ratio: Spread, global_step: int) -> dict[str, Any]:
    record = SamplesRecord(global_step, staleness=Spread(mean=staleness, max=staleness), made_by={0: 8}, ratio=ratio)
    return record.to_record()


def _learned_from_replicas(run: Run) -> list[str]:
    """The lines of a run whose only finished stage learned from samples of replicas."""
    metrics = {
        "loss": 0.1, "reward": 0.83, "rollout/staleness_max": 2.0, "rollout/wait_seconds": 0.004,
        "sampling/importance_sampling_ratio/mean": 0.9991, "sampling/importance_sampling_ratio/min": 0.951,
        "sampling/importance_sampling_ratio/max": 1.043,
    }  # fmt: skip
    result = StageResult(
        kind="sft", run_id="run-1", global_step=3, resumed_from_step=0, train_seconds=1.0, metrics=metrics
    )
    run.job("sft").done_path.write_text(result.model_dump_json())
    run.job("sft").metrics_path.write_text('{"step": 1, "reward": 0.5}\n{"step": 3, "reward": 0.83}\n{"step": 3}\n')
    written = write_summary(run, read_lineage(run.open_chain()), "", 1.0)
    assert RunSummary.model_validate_json(run.summary_path.read_text()) == written
    return list(stage_lines(written))[2:-1]


def test_a_stage_that_learned_from_replicas_says_its_rewards_and_its_ratios(run: Run) -> None:
    """That of staleness 0 is of the first step whose samples all have that age, as its record says."""
    chain = run.open_chain()
    write_record(chain, SAMPLES, 0, "sft-1", _sampled(1.0, Spread(0.9, 0.8, 1.2), 1))
    write_record(chain, SAMPLES, 1, "sft-2", _sampled(0.0, Spread(1.00004, 0.9992, 1.0007), 2))
    assert _learned_from_replicas(run) == [
        "sft: reward 0.500 at step 1, 0.830 at step 3, on samples of replicas; docs/rollouts.md shows it beside that "
        "of the shipped recipe without them, for the same seeds",
        "sft: importance sampling ratio at staleness 0: 1.00004, 0.99920 to 1.00070 (step 2, whose samples the newest "
        "version made)",
        "sft: importance sampling ratio at the last step: 0.9991, 0.951 to 1.043, of samples at most 2 versions old; "
        "training stood still for 0.00 s a batch",
    ]


def test_without_a_record_of_staleness_zero_no_ratio_is_said_of_it(run: Run) -> None:
    write_record(run.open_chain(), SAMPLES, 0, "sft-1", _sampled(1.0, Spread(0.9, 0.8, 1.2), 1))
    write_record(run.open_chain(), SAMPLES, 1, "sft-2", _sampled(0.0, Spread(), 2))
    lines = _learned_from_replicas(run)
    assert len(lines) == 2
    assert not any("staleness 0" in line for line in lines)


def test_the_table_fits_a_narrow_terminal(run: Run) -> None:
    console = Console(file=io.StringIO(), width=100)
    console.print(versions_table(read_lineage(run.open_chain()), "run-1"))
    lines = _text(console).splitlines()
    assert any(line.split()[:3] == ["v1", "*", "sft"] and line.endswith(("03:04:05", "03:04:05  ")) for line in lines)
    assert max(len(line.rstrip()) for line in lines) <= 100


def test_the_table_of_many_versions_shows_milestones_and_the_first_best_and_last_of_each_stage() -> None:
    scores = {3: 0.5, 7: 0.9, 9: 0.9, 12: 0.1}
    rows = [row(v, stage="sft" if v < 10 else "grpo", is_milestone=v in (0, 8), score=scores.get(v)) for v in range(60)]
    assert [one.version for one in milestone_rows(rows)] == [0, 7, 8, 9, 10, 12, 59]
    assert milestone_rows(rows[:1]) == (rows[0],)
    assert milestone_rows(()) == ()
    line = count_line(7, 60, "file:///x")
    assert line.startswith("60 versions, shown: milestones,")
    assert "weightline log file:///x --limit 60" in line
    assert "all of them" in count_line(3, 3, "file:///x")


def test_progress_is_read_from_the_folder_and_the_bucket(run: Run) -> None:
    watch = RunWatch(run)
    moment = watch.look()
    assert (moment.num_versions, moment.num_evaluated, moment.num_served) == (2, 1, 2)
    assert moment.unsettled == (1,)
    assert moment.newest_score == 0.25
    sft, dpo = moment.stages
    assert (sft.step, sft.max_steps, sft.headline) == (3, 4, "loss 1.500")
    assert (dpo.step, dpo.headline) == (0, "")
    write_record(run.open_chain(), EVALUATIONS, 1, "arithmetic", {"status": "done", "score": 0.75})
    assert watch.look().unsettled == ()


def test_without_a_terminal_a_run_tells_lines(run: Run) -> None:
    console = Console(file=io.StringIO(), width=200)
    moment = RunWatch(run).look()
    with RunScreen(console, run) as screen:
        screen.show(moment)
        screen.show(moment)
    # rich 14.0 to 14.2 ends with an empty line.
    assert _text(console).rstrip().splitlines() == ["sft 3/4 loss 1.500; 2 versions, 1 evaluated, 2 served"]


def test_on_a_terminal_a_run_shows_bars(run: Run) -> None:
    console = Console(file=io.StringIO(), width=120, force_terminal=True)
    with RunScreen(console, run) as screen:
        screen.show(RunWatch(run).look())
        screen.say("a [bracketed] word")
    shown = _text(console)
    assert "3/4" in shown
    assert "served 2, score 0.250" in shown
    assert "a [bracketed] word" in shown
