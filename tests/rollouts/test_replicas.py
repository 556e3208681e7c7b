"""Samples from real replicas, while the chain grows and replicas come and go."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests import ROOT
from tests.serving.model_chains import ModelChain, make_chain
from tests.serving.servers import TOKEN, running_replica
from tests.waiting import PATIENCE_SECONDS, wait_until
from weightline.chain.read.records import REFRESHES, read_record
from weightline.errors import RolloutError
from weightline.rollouts.batch import Taken
from weightline.rollouts.fleet import ReplicaFleet
from weightline.rollouts.producer import Producer
from weightline.rollouts.push import Pusher
from weightline.rollouts.sample import Sample
from weightline.rollouts.sampling import Sampling
from weightline.rollouts.staleness import Lineage, StalenessRule, staleness_of
from weightline.serving.http.auth import TOKEN_VARIABLE
from weightline.serving.http.hosts import REPLICA_HOSTS_VARIABLE
from weightline.serving.replica.following import Following

SAMPLING = Sampling(n=2, max_tokens=8)
#: A replica that moves only when it is told to.
NEVER = Following(86400.0)


def _prompts(k: int) -> list[list[int]]:
    """Four groups of batch k, each of two rows."""
    return [[10 + k, 40 + group, 12] for group in range(4) for _ in range(2)]


def _check(k: int, taken: Taken) -> None:
    """Every row of the batch has its own sample, and no other."""
    assert [list(sample.prompt_ids) for sample in taken.samples] == _prompts(k)
    assert len({sample.token_ids for sample in taken.samples}) == len(taken.samples)


@pytest.fixture
def grown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModelChain:
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    monkeypatch.delenv(REPLICA_HOSTS_VARIABLE, raising=False)
    return make_chain((tmp_path / "bucket").as_uri(), num_versions=1)


@pytest.mark.parametrize(("lookahead", "staleness"), [(0, 0), (1, 1), (1, 2)])
def test_no_sample_is_older_than_the_bound_while_the_chain_moves(
    lookahead: int, staleness: int, grown: ModelChain, tmp_path: Path
) -> None:
    rule, lineage = StalenessRule(lookahead, staleness), Lineage()
    ages = []
    with (
        running_replica(grown.chain, tmp_path / "a", "a", following=Following(0.05)),
        Producer(ReplicaFleet(grown.chain.url), SAMPLING, seed=1, max_batches=lookahead + 1) as producer,
    ):
        for newest in range(5):  # batch k is trained on at version k
            for k in range(newest, newest + lookahead + 1):
                producer.request(k, _prompts(k), rule.min_version(k, lineage))

            def is_fresh(sample: Sample, newest: int = newest) -> bool:
                return rule.is_fresh(sample, newest, lineage)

            taken = producer.take(newest, _prompts(newest), is_fresh, rule.min_version(newest, lineage))
            _check(newest, taken)
            ages += [staleness_of(sample, newest, lineage) for sample in taken.samples]
            grown.grow()
    assert all(age is not None and age <= staleness for age in ages)


def test_a_version_that_no_replica_serves_ends_training_by_name(grown: ModelChain, tmp_path: Path) -> None:
    with (
        running_replica(grown.chain, tmp_path / "a", "a", version=0) as replica,
        Producer(ReplicaFleet(grown.chain.url), SAMPLING, deadline_seconds=3.0) as producer,
    ):
        wait_until(lambda: any("serves version 0" in line for line in producer.describe()))
        with pytest.raises(RolloutError, match=f"by version 1 or later .* a at {replica.url} serves version 0"):
            producer.take(0, _prompts(0), min_version=1)


def test_a_lease_of_a_host_that_is_not_trusted_gets_no_prompts(
    grown: ModelChain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(REPLICA_HOSTS_VARIABLE, "*.pool.svc")
    with (
        running_replica(grown.chain, tmp_path / "a", "a", version=0),
        Producer(ReplicaFleet(grown.chain.url), SAMPLING, deadline_seconds=2.0) as producer,
    ):
        wait_until(producer.describe)
        with pytest.raises(RolloutError, match="WEIGHTLINE_REPLICA_HOSTS does not allow its host"):
            producer.take(0, _prompts(0))


def test_a_commit_is_pushed_to_those_that_follow_the_tip(grown: ModelChain, tmp_path: Path) -> None:
    with ExitStack() as stack:
        told, other, named = (
            stack.enter_context(running_replica(grown.chain, tmp_path / name, name, following=following, version=0))
            for name, following in (("told", NEVER), ("other", None), ("named", None))
        )
        pusher = Pusher(grown.chain.url, {named.url: TOKEN}, look_seconds=0.1)
        stack.callback(pusher.close)
        for version in (1, 2):
            manifest = grown.grow()
            pusher.committed(version, manifest.commit_id)
            wait_until(lambda version=version: told.replica.version == named.replica.version == version)  # type: ignore[misc]
        wait_until(lambda: pusher.num_pushed >= 4)
        assert pusher.num_failures == 0
        assert other.replica.version == 0
    record = read_record(grown.chain, REFRESHES, 2, "told")
    assert record is not None
    assert record["status"] == "done"


def test_a_push_that_fails_is_counted_and_harms_nothing(grown: ModelChain) -> None:
    pusher = Pusher(grown.chain.url, {"http://127.0.0.1:9": TOKEN})
    try:
        pusher.committed(0, "0" * 32)
        wait_until(lambda: pusher.num_failures == 1)
    finally:
        pusher.close()
    assert pusher.num_pushed == 0


@contextmanager
def _server(chain_url: str, state_dir: Path, name: str) -> Iterator[subprocess.Popen[bytes]]:
    """A replica in a process of its own, as a person starts it."""
    argv = [sys.executable, "-m", "weightline", "serve", "transformers", "--follow", chain_url, "--name", name]
    argv += ["--state-dir", str(state_dir), "--port", "0", "--every", "0.1", "--lease", "20"]
    process = subprocess.Popen(argv, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        yield process
    finally:
        process.kill()
        process.wait(PATIENCE_SECONDS)


def _serving(producer: Producer, names: Sequence[str]) -> bool:
    lines = producer.describe()
    return all(any(line.startswith(f"{name} at") and "serves version" in line for line in lines) for name in names)


@pytest.mark.process
def test_replicas_that_are_killed_and_that_join_lose_nothing_and_double_nothing(
    grown: ModelChain, tmp_path: Path
) -> None:
    """Batches go on, with the samples that an undisturbed replica makes of the same seeds and versions."""
    url, long = grown.chain.url, Sampling(n=2, max_tokens=40)
    made: dict[int, Taken] = {}
    with ExitStack() as stack:
        first = stack.enter_context(_server(url, tmp_path / "a", "a"))
        stays = stack.enter_context(running_replica(grown.chain, tmp_path / "b", "b", version=0))
        producer = stack.enter_context(
            Producer(ReplicaFleet(url, look_seconds=0.2), long, seed=1, groups_per_request=1, deadline_seconds=200)
        )
        wait_until(lambda: _serving(producer, ["a", "b"]), told=producer.describe)
        made[0] = producer.take(0, _prompts(0))
        producer.request(1, _prompts(1), 0)
        first.send_signal(signal.SIGKILL)
        producer.request(2, _prompts(2), 0)
        made[1] = producer.take(1, _prompts(1))
        stack.enter_context(_server(url, tmp_path / "a", "a"))
        stack.enter_context(running_replica(grown.chain, tmp_path / "c", "c", version=0))
        made[2] = producer.take(2, _prompts(2))
        wait_until(lambda: _serving(producer, ["a", "b", "c"]), told=producer.describe)
        made[3] = producer.take(3, _prompts(3))
        assert producer.shares().keys() >= {"a", "b", "c"}
        assert made[3].replicas.keys() == {"a", "b", "c"}
        state = json.loads(json.dumps(producer.snapshot()))
        assert state["batches"] == []
        again = stack.enter_context(Producer(ReplicaFleet(url, [stays.url]), long, seed=1))
        for k, taken in made.items():
            _check(k, taken)
            undisturbed = again.take(k, _prompts(k)).samples
            assert [sample.token_ids for sample in taken.samples] == [one.token_ids for one in undisturbed]
