"""Three replicas behind real sockets, moved by the flow: one first, its gate, then the others, or all go back."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.runs.recipes import TOY
from tests.serving.model_chains import ModelChain, assert_same_bits, engine_bits, fresh_bits, make_chain
from tests.serving.servers import TOKEN, RunningReplica, running_replica
from tests.waiting import wait_until
from weightline.chain.read.records import EVALUATIONS, REFRESHES, ROLLOUTS, read_record, read_records, write_record
from weightline.chain.read.refs import history_of
from weightline.errors import ApplyError, DigestMismatchError
from weightline.evaluation.gate import ScoreGate
from weightline.fleet.local_replica import REPLICAS_DIR_VARIABLE
from weightline.fleet.members import SERVING_URL_VARIABLE, find_fleet
from weightline.fleet.rollout import RolloutSettings, open_rollout
from weightline.flows.serving_refresh import refresh_serving
from weightline.runs.recipes import RUNS
from weightline.serving.http import client
from weightline.serving.http.auth import TOKEN_VARIABLE
from weightline.serving.replica.following import Following
from weightline.types import Changes

pytestmark = pytest.mark.usefixtures("server")
NAMES = ("r-0", "r-1", "r-2")


@dataclass
class Three:
    """A chain, and three replicas of it that serve version 0."""

    grown: ModelChain
    folder: Path
    replicas: dict[str, RunningReplica] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return self.grown.chain.url

    def versions(self) -> dict[str, int | None]:
        """What each one answers with, asked over HTTP."""
        return {name: client.status(running.url).version for name, running in self.replicas.items()}

    def score(self, version: int, score: float) -> None:
        """What evaluate-version would write."""
        write_record(self.grown.chain, EVALUATIONS, version, "arithmetic", {"status": "done", "score": score})

    def told(self, version: int) -> dict[str, str]:
        """Status of the refresh by replica."""
        records = (r for r in read_records(self.grown.chain, REFRESHES) if r["version"] == version)
        return {record["name"]: record["status"] for record in records}

    def serving(self) -> list[int]:
        """Every move of the ref."""
        return [ref.version for ref in history_of(self.grown.chain, "serving")]

    def outcome(self, version: int) -> dict[str, Any]:
        record = read_record(self.grown.chain, ROLLOUTS, version, "outcome")
        assert record is not None
        return record


@pytest.fixture
def three(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Three]:
    """Found by their leases, as a pipeline finds them that nobody told where they are."""
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    monkeypatch.delenv(SERVING_URL_VARIABLE, raising=False)
    monkeypatch.delenv(REPLICAS_DIR_VARIABLE, raising=False)
    grown = make_chain(f"memory://{uuid.uuid4().hex}/toy", num_versions=2)
    recipe = {"status": "done", "recipe": TOY}
    write_record(grown.chain, RUNS, 0, "run-1", recipe)
    made = Three(grown, tmp_path)
    with ExitStack() as stack:
        for name in NAMES:
            made.replicas[name] = stack.enter_context(running_replica(grown.chain, tmp_path / name, name, version=0))
        yield made


class _Evaluation(threading.Thread):
    """Writes a score as soon as the canary serves the version, and keeps who else did by then."""

    def __init__(self, three: Three, version: int, score: float) -> None:
        super().__init__(daemon=True)
        self.three, self.version, self.score = three, version, score
        self.seen: dict[str, int | None] = {}
        self.start()

    def run(self) -> None:
        wait_until(lambda: self.version in self.three.versions().values())
        self.seen = self.three.versions()
        self.three.score(self.version, self.score)


def test_a_version_that_passes_reaches_all_after_the_canary(three: Three) -> None:
    three.score(0, 0.80)
    evaluation = _Evaluation(three, 1, 0.77)
    record = refresh_serving(three.url, 1, wave_size=2, canary="r-1", min_score=0.5, max_drop=0.05)
    evaluation.join(10)
    assert evaluation.seen == {"r-0": 0, "r-1": 1, "r-2": 0}, "nobody moves before the canary is judged"
    assert three.versions() == dict.fromkeys(NAMES, 1)
    assert three.told(1) == dict.fromkeys(NAMES, "done")
    assert three.serving() == [1]
    assert record == three.outcome(1)
    told = (record["status"], record["moved"], record["score"], record["baseline_version"], record["baseline_score"])
    assert told == ("done", ["r-1", "r-0", "r-2"], 0.77, 0, 0.80)
    for name, running in three.replicas.items():
        fresh = fresh_bits(three.grown.chain, 1, three.folder / f"fresh-{name}")
        assert_same_bits(engine_bits(running.replica.engine), fresh)  # type: ignore[arg-type]


def test_a_version_that_fell_too_far_is_taken_back_from_the_canary_and_reaches_nobody(three: Three) -> None:
    three.score(0, 0.80)
    evaluation = _Evaluation(three, 1, 0.60)
    record = refresh_serving(three.url, 1, canary="r-2", max_drop=0.05)
    evaluation.join(10)
    assert evaluation.seen == {"r-0": 0, "r-1": 0, "r-2": 1}
    assert three.versions() == dict.fromkeys(NAMES, 0)
    base = fresh_bits(three.grown.chain, 0, three.folder / "fresh")
    assert_same_bits(engine_bits(three.replicas["r-2"].replica.engine), base)  # type: ignore[arg-type]
    assert record["status"] == "rolled_back"
    assert "fell by 25.0 %, from 0.8 at version 0 to 0.6" in record["reason"]
    assert three.told(1) == {"r-0": "skipped", "r-1": "skipped", "r-2": "rolled_back"}
    canary = read_record(three.grown.chain, REFRESHES, 1, "r-2")
    assert canary is not None
    assert (canary["returned_to"], canary["reason"]) == (0, record["reason"])
    assert three.serving() == []

    again = refresh_serving(three.url, 1)
    assert again == record, "what was taken back stays so"
    assert three.versions() == dict.fromkeys(NAMES, 0)

    three.grown.grow()
    three.score(2, 0.79)
    assert refresh_serving(three.url, 2, max_drop=0.05)["status"] == "done"
    assert three.versions() == dict.fromkeys(NAMES, 2)
    assert three.told(1)["r-2"] == "rolled_back"


def test_what_is_known_to_be_too_bad_does_not_even_reach_the_canary(three: Three) -> None:
    three.score(1, 0.2)
    moved: list[str] = []
    for name, running in three.replicas.items():
        running.replica.engine.scatter = lambda _, name=name: moved.append(name)  # type: ignore[method-assign]
    record = refresh_serving(three.url, 1, min_score=0.5)
    assert (record["status"], record["reason"]) == ("skipped", "its score 0.2 is below 0.5")
    assert three.told(1) == dict.fromkeys(NAMES, "skipped")
    assert moved == []


def test_a_version_that_nobody_measured_is_measured_by_the_flow(three: Three) -> None:
    """Really: lm-evaluation-harness on exactly that version. Random weights solve no sum."""
    record = refresh_serving(three.url, 1, min_score=0.5, limit=4, wait_seconds=0)
    measured = read_record(three.grown.chain, EVALUATIONS, 1, "arithmetic")
    assert measured is not None
    assert (measured["status"], measured["num_problems"]) == ("done", 4)
    assert measured["commit_id"] == three.grown.chain.manifest(1).commit_id
    assert (record["status"], record["score"]) == ("rolled_back", measured["score"])
    assert three.versions() == dict.fromkeys(NAMES, 0)


def test_a_replica_that_has_nothing_to_go_back_to_waits_for_the_verdict(
    three: Three, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh = make_chain(f"memory://{uuid.uuid4().hex}/toy")
    write_record(fresh.chain, RUNS, 0, "run-1", {"status": "done", "recipe": TOY})
    write_record(fresh.chain, EVALUATIONS, 0, "arithmetic", {"status": "done", "score": 0.1})
    with running_replica(fresh.chain, tmp_path / "new", "new") as running:
        assert refresh_serving(fresh.chain.url, 0, min_score=0.5)["status"] == "skipped"
        assert running.replica.version is None
    with running_replica(fresh.chain, tmp_path / "follows", "follows", following=Following(0.05, "serving")) as running:
        fresh.grow()
        write_record(fresh.chain, EVALUATIONS, 1, "arithmetic", {"status": "done", "score": 0.9})
        record = refresh_serving(fresh.chain.url, 1, min_score=0.5)
        assert (record["status"], record["moved"], record["followers"]) == ("done", [], ["follows"])
        wait_until(lambda: running.replica.version == 1)


def test_a_replica_that_follows_by_itself_is_not_moved_though_its_url_was_named(
    three: Three, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would go back to what it follows, and a rollout that takes everybody back would not have it along."""
    with (
        running_replica(three.grown.chain, tmp_path / "tipper", "tipper", following=Following(0.05)) as tipper,
        running_replica(three.grown.chain, tmp_path / "waits", "waits", following=Following(0.05, "serving")) as waits,
    ):
        wait_until(lambda: tipper.replica.version == 1)
        urls = [running.url for running in (*three.replicas.values(), tipper, waits)]
        monkeypatch.setenv(SERVING_URL_VARIABLE, " ".join(urls))
        three.score(1, 0.1)
        record = refresh_serving(three.url, 1, min_score=0.5)
        assert (record["status"], record["followers"], record["ungated"]) == (
            "skipped",
            ["tipper", "waits"],
            ["tipper"],
        )
        assert waits.replica.version in (None, 0)
        assert tipper.replica.version == 1
    assert three.versions() == dict.fromkeys(NAMES, 0)


def _failing(running: RunningReplica, how: Callable[[Sequence[Changes]], None]) -> None:
    """The engine's next scatter fails by `how`; after that it works again."""
    real = running.replica.engine.scatter

    def scatter(changes: Sequence[Changes]) -> None:
        running.replica.engine.scatter = real  # type: ignore[method-assign]
        how(changes)

    running.replica.engine.scatter = scatter  # type: ignore[method-assign]


def _corrupt(_: Sequence[Changes]) -> None:
    raise DigestMismatchError("the memory of this one is broken", what="w")


def test_when_a_later_wave_fails_all_go_back(three: Three) -> None:
    _failing(three.replicas["r-2"], _corrupt)
    record = refresh_serving(three.url, 1, wave_size=1, canary="r-0")
    assert record["status"] == "rolled_back"
    assert "r-2 could not move: the memory of this one is broken" in record["reason"]
    assert three.versions() == dict.fromkeys(NAMES, 0)
    assert three.told(1) == {"r-0": "rolled_back", "r-1": "rolled_back", "r-2": "failed"}
    assert three.serving() == []


def test_a_failure_that_was_allowed_for_stops_nobody_else(three: Three) -> None:
    _failing(three.replicas["r-2"], _corrupt)
    record = refresh_serving(three.url, 1, canary="r-0", max_failed=1)
    assert (record["status"], list(record["failed"])) == ("done", ["r-2"])
    assert three.versions() == {"r-0": 1, "r-1": 1, "r-2": 0}
    assert three.told(1) == {"r-0": "done", "r-1": "done"}
    assert refresh_serving(three.url, 1)["status"] == "done", "offered again to who does not have it"
    assert three.versions() == dict.fromkeys(NAMES, 1)


def test_a_broken_version_is_recorded_as_failed_and_the_run_says_so(three: Three) -> None:
    payload = three.grown.chain.manifest(1).payloads[0]
    three.grown.chain.store.put(payload.key, b"x" * payload.nbytes)
    with pytest.raises(ApplyError, match=r"version 1: failed: r-0 could not move: .*sha256"):
        refresh_serving(three.url, 1)
    assert three.told(1) == {"r-0": "failed", "r-1": "skipped", "r-2": "skipped"}
    assert three.versions() == dict.fromkeys(NAMES, 0)


def test_a_run_that_crashed_after_the_canary_moved_still_knows_where_it_came_from(three: Three) -> None:
    chain = three.grown.chain
    settings = RolloutSettings(canary="r-1", gate=ScoreGate(min_score=0.5))
    planned = open_rollout(chain, 1, settings, find_fleet(chain))
    assert planned.plan.canary == "r-1"
    client.refresh(three.replicas["r-1"].url, TOKEN, 1)
    three.score(1, 0.1)
    # ... and here the run ended, before the score was there.
    again = open_rollout(chain, 1, settings, find_fleet(chain))
    assert (again.plan, again.came_from) == (planned.plan, dict.fromkeys(NAMES, 0))


def test_a_crashed_run_takes_the_canary_back_when_it_is_started_again(three: Three) -> None:
    chain = three.grown.chain
    open_rollout(chain, 1, RolloutSettings(canary="r-1"), find_fleet(chain))
    client.refresh(three.replicas["r-1"].url, TOKEN, 1)
    three.score(1, 0.1)
    record = refresh_serving(three.url, 1, canary="r-1", min_score=0.5)
    assert record["status"] == "rolled_back"
    assert three.versions() == dict.fromkeys(NAMES, 0)


def test_who_is_away_catches_up_and_who_follows_waits_for_the_gate(three: Three, tmp_path: Path) -> None:
    three.grown.grow()
    follows = Following(0.05, "serving")
    with running_replica(three.grown.chain, tmp_path / "follower", "follower", following=follows) as follower:
        evaluation = _Evaluation(three, 1, 0.9)
        record = refresh_serving(three.url, 1, min_score=0.5)
        evaluation.join(10)
        assert record["followers"] == ["follower"]
        wait_until(lambda: follower.replica.version == 1)
    three.score(2, 0.1)
    assert refresh_serving(three.url, 2, min_score=0.5)["status"] == "skipped"
    three.grown.grow()
    three.score(3, 0.8)
    assert refresh_serving(three.url, 3, min_score=0.5)["followers"] == []
    with running_replica(three.grown.chain, tmp_path / "follower", "follower", following=follows) as back:
        assert back.replica.version is None or back.replica.version == 1
        wait_until(lambda: back.replica.version == 3)
        wait_until(lambda: three.told(3).get("follower") == "done")
    assert three.told(2)["follower"] == "skipped"
    assert three.serving() == [1, 3]


def test_going_back_on_purpose_takes_everybody_and_the_followers_along(three: Three) -> None:
    refresh_serving(three.url, 1)
    record = refresh_serving(three.url, 0, allow_backward=True)
    assert (record["status"], sorted(record["moved"])) == ("done", list(NAMES))
    assert three.versions() == dict.fromkeys(NAMES, 0)
    assert three.serving() == [1, 0]
    assert refresh_serving(three.url, 1)["status"] == "done"
    assert three.versions() == dict.fromkeys(NAMES, 1)


def test_a_request_that_comes_late_moves_nobody(three: Three) -> None:
    three.grown.grow()
    refresh_serving(three.url, 2)
    record = refresh_serving(three.url, 1)
    assert record["status"] == "done"
    assert three.versions() == dict.fromkeys(NAMES, 2)
    assert three.told(1) == dict.fromkeys(NAMES, "skipped")
    assert three.serving() == [2]


def test_a_request_of_a_commit_serves_the_newest_version_and_settles_those_between(three: Three) -> None:
    for number in range(6):
        three.grown.grow(is_milestone=number == 2)
    record = refresh_serving(three.url, 5, or_newer=True)
    assert (record["version"], record["status"]) == (7, "done")
    assert three.versions() == dict.fromkeys(NAMES, 7)
    assert [three.told(version) for version in (5, 6)] == [{"serving": "skipped"}] * 2, "no replica knows of them"
    milestone = refresh_serving(three.url, 4, or_newer=True)
    assert (milestone["version"], milestone["status"]) == (4, "done")
    assert three.versions() == dict.fromkeys(NAMES, 7)
    three.grown.grow()
    three.grown.grow()
    assert refresh_serving(three.url, 8, or_newer=True)["version"] == 9
    assert three.told(8) == dict.fromkeys(NAMES, "skipped")
    assert three.serving() == [7, 9]
