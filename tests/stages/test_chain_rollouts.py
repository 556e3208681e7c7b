"""GRPO under ZeRO-3 on two ranks, with completions from a replica that follows the chain: real parts, real weights."""

from __future__ import annotations

import copy
import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import run_stage, start_stage
from tests.serving.servers import RunningReplica, running_replica
from tests.stages import rollout_ranks
from tests.stages.exact_rollouts import NUM_GENERATIONS, assert_on_policy, logged_steps, make_model, rollout_job
from tests.stages.rewards import NOTES
from weightline.chain import open_chain
from weightline.chain.read.records import SAMPLES, read_records
from weightline.rollouts.record import parse_samples
from weightline.serving.engines.transformers import TransformersEngine
from weightline.serving.replica.following import Following
from weightline.stages.job import StageJob, StageResult

pytestmark = pytest.mark.train


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@contextmanager
def _following(folder: Path, engine: TransformersEngine | None = None) -> Iterator[RunningReplica]:
    """A replica of the job's chain, which it follows from its first version on."""
    chain = open_chain(f"file://{folder}/bucket/chain")
    with running_replica(chain, folder / "replica", "rollouts", following=Following(0.05), engine=engine) as replica:
        yield replica


def _run(job: StageJob, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(NOTES, str(job.output_dir.parent / "notes"))
    run_stage(job, job.output_dir.parent / "ranks.log", rollout_ranks.main)


def _notes(job: StageJob) -> dict[str, Any]:
    """Prompts, completions and rewards by rank and step."""
    return {path.name: json.loads(path.read_text()) for path in (job.output_dir.parent / "notes").iterdir()}


@pytest.fixture(scope="module")
def on_policy(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StageJob]:
    """A stage that was trained exactly on policy."""
    folder = tmp_path_factory.mktemp("on-policy")
    with pytest.MonkeyPatch.context() as patch, _following(folder) as replica:
        job = rollout_job(model_dir, folder, 5, lookahead=0, staleness=0, replicas=[replica.url])
        _run(job, patch)
        yield job


def test_at_staleness_zero_the_replica_computes_what_the_trainer_computes(on_policy: StageJob) -> None:
    assert_on_policy(on_policy, 5)
    assert on_policy.chain_url is not None
    chain = open_chain(on_policy.chain_url)
    assert min(manifest.num_changed for manifest in chain.manifests(1)) > 0


@pytest.mark.nightly
def test_twenty_five_steps_stay_exact(model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with _following(tmp_path) as replica:
        job = rollout_job(model_dir, tmp_path, 25, lookahead=0, staleness=0, replicas=[replica.url])
        _run(job, monkeypatch)
    assert_on_policy(job, 25)


def test_nothing_is_gathered_for_generation(on_policy: StageJob) -> None:
    for rank in (0, 1):
        after_step = json.loads((on_policy.output_dir / f"gathers-{rank}.json").read_text())
        assert len(after_step) == 5
        assert len(set(after_step[:4])) == 1  # the checkpoint of step 4 gathers the model to save it


def test_each_version_says_which_samples_it_was_trained_on(on_policy: StageJob) -> None:
    assert on_policy.chain_url is not None
    found = read_records(open_chain(on_policy.chain_url), SAMPLES)
    assert [(record["version"], record["name"]) for record in found] == [(n, f"grpo-{n}") for n in range(1, 6)]
    notes = _notes(on_policy)
    for record in found:
        samples = parse_samples(record)
        step = record["version"] - 1
        assert samples.made_by == {step: 16}
        assert {name: work.num_samples for name, work in samples.replicas.items()} == {"rollouts": 16}
        assert samples.staleness.max == 0
        assert samples.logp_difference.max is not None
        assert samples.logp_difference.max < 1e-4
        prompts, completions, rewards = notes[f"rank-0-step-{step}.json"]
        assert [group.prompt for group in samples.groups] == prompts[::NUM_GENERATIONS]
        shown = [(one.text, one.reward) for group in samples.groups for one in group.completions]
        assert [text for text, _ in shown] == completions
        assert [reward for _, reward in shown] == pytest.approx(rewards)
        assert {span.version for group in samples.groups for one in group.completions for span in one.spans} == {step}


class _Stuck(TransformersEngine):
    """Says that it serves each version, and answers with the weights of the first one."""

    def load(self, folder: Path) -> None:
        super().load(folder)
        self._first = copy.deepcopy(self._model)

    def generate(self, request: Any) -> Any:
        newest, self._model = self._model, self._first
        try:
            return super().generate(request)
        finally:
            self._model = newest


def test_a_replica_with_the_weights_of_another_version_is_seen(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with _following(tmp_path, _Stuck("cpu")) as replica:
        job = rollout_job(model_dir, tmp_path, 3, lookahead=0, staleness=0, replicas=[replica.url])
        _run(job, monkeypatch)
    first, *later = [line["sampling/sampling_logp_difference/max"] for line in logged_steps(job)]
    assert first < 1e-4
    assert min(later) > 1e-3
    with pytest.raises(AssertionError):
        assert_on_policy(job, 3)


def test_a_killed_training_goes_on_with_the_samples_that_were_made_ahead(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lookahead 1 and staleness 1 leave one version that may answer: so both trainings see the same samples."""
    jobs = []
    for name in ("undisturbed", "killed"):
        folder = tmp_path / name
        with _following(folder) as replica:
            job = rollout_job(model_dir, folder, 9, lookahead=1, staleness=1, replicas=[replica.url])
            jobs.append(job)
            if name == "killed":
                monkeypatch.setenv(NOTES, str(folder / "notes"))
                monkeypatch.setenv(rollout_ranks.KILL, "6")
                ranks = start_stage(job, folder / "killed.log", rollout_ranks.main)
                assert ranks.wait()[1] == -signal.SIGKILL, ranks.log_tail
                monkeypatch.delenv(rollout_ranks.KILL)
            _run(job, monkeypatch)
    undisturbed, killed = jobs
    result = StageResult.load(killed)
    assert result is not None
    assert result.resumed_from_step == 4
    assert len(_notes(undisturbed)) == 2 * 9
    assert _notes(killed) == _notes(undisturbed)
    for name in ("reward", "rollout/staleness_max", "rollout/num_regenerated"):
        assert [line[name] for line in logged_steps(killed)] == [line[name] for line in logged_steps(undisturbed)]
    assert {line["rollout/staleness_max"] for line in logged_steps(undisturbed)[1:]} == {1}
    assert killed.chain_url is not None
    manifests = open_chain(killed.chain_url).manifests()
    revert = next(manifest for manifest in manifests if manifest.kind == "revert")
    reverted = range(4 + 1, revert.version)
    assert len(reverted) > 0
    for record in read_records(open_chain(killed.chain_url), SAMPLES, revert.version):
        assert not set(parse_samples(record).made_by) & set(reverted)
