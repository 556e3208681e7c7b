"""A whole chain in a Hub bucket: racing writers, a network that fails, and what `weightline verify` says."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from tests.chains import commit_state, later, make_manifest, nudged, random_state
from tests.hub_emulator import Cut, Fault, HubEmulator, LoseReply, Status
from tests.store.hub_racers import commit_states
from tests.store.racers import race
from weightline.chain import Chain, open_chain
from weightline.chain.replay.state import read_state
from weightline.chain.upkeep.gc import collect, plan_gc, view_chain
from weightline.chain.upkeep.verify import verify_chain
from weightline.chain.write.commit import commit_manifest, new_commit_id
from weightline.cli.main import app
from weightline.errors import CommitConflictError, StorageError, TransientStorageError
from weightline.format import keys
from weightline.store.hub.store import open_hub

STATES = [random_state(0, {"weight": (6, 4), "scale": ()})]
STATES.append(nudged(STATES[0], 1, density=0.5))


@pytest.fixture(params=["claims", "s3-gateway"])
def url(request: pytest.FixtureRequest, hub_url: str) -> str:
    if request.param == "s3-gateway":
        request.getfixturevalue("hub_s3_url")
    return hub_url


def _committed(url: str) -> Chain:
    chain = Chain(open_hub(url))
    for number, state in enumerate(STATES):
        commit_state(chain, state, STATES[number - 1] if number else None, world_size=1)
    return chain


def test_verify_says_the_mode(hub: HubEmulator, url: str, request: pytest.FixtureRequest) -> None:
    _committed(url)
    mode = "s3-gateway" if "s3-gateway" in request.node.name else "claims"
    text = CliRunner().invoke(app, ["verify", url])
    assert (text.exit_code, f"commit mode {mode}" in text.output) == (0, True), text.output
    report = json.loads(CliRunner().invoke(app, ["verify", url, "--json"]).output)
    assert (report["commit_mode"], report["holds"]) == (mode, True)


def test_verify_reports_a_fork(hub: HubEmulator, hub_url: str) -> None:
    chain = _committed(hub_url)
    store = open_hub(hub_url)
    manifest = chain.manifest(1)
    store._bucket.write(f"{store._claims.folder(manifest.key)}other", store._bucket.upload(b"another manifest"))
    report = verify_chain(open_chain(hub_url))
    assert [(finding.rule, finding.subject) for finding in report.findings] == [("fork", manifest.key)]


def test_two_writers_of_a_version_know_who_won(hub: HubEmulator, url: str) -> None:
    chain = _committed(url)
    won = commit_state(Chain(open_hub(url)), STATES[0], STATES[1], world_size=1)

    class Stale(Chain):
        """It read the tip before the other writer committed."""

        def tip_version(self) -> int | None:
            return 1

    with pytest.raises(CommitConflictError) as caught:
        commit_state(Stale(open_hub(url)), STATES[0], STATES[1], world_size=1)
    assert caught.value.facts["winner"] == won.commit_id
    assert verify_chain(chain).holds


def test_a_winner_that_stopped_is_shown_and_finished_by_its_next_writer(
    hub: HubEmulator, hub_url: str, hurried: None
) -> None:
    """Its claim stands, the version does not: readers go on seeing the version before, and verify says what to do."""
    _committed(hub_url)
    _stop_after_the_claim(hub, hub_url)
    reader = open_chain(hub_url)
    assert reader.tip_version() == 1
    (finding,) = verify_chain(reader).findings
    assert (finding.rule, finding.subject) == ("unpublished", keys.commit(2))
    assert "Run that writer twice" in finding.message
    with pytest.raises(CommitConflictError):
        commit_state(Chain(open_hub(hub_url)), STATES[0], STATES[1], world_size=1)
    assert reader.tip_version() == 2
    assert verify_chain(Chain(open_hub(hub_url))).holds


def test_nothing_is_collected_while_a_won_version_is_not_published(
    hub: HubEmulator, hub_url: str, hurried: None
) -> None:
    """Its payloads look like garbage, however old: no manifest names them yet, and the next writer publishes one."""
    _committed(hub_url)
    _stop_after_the_claim(hub, hub_url)
    with pytest.raises(StorageError, match=f"{keys.commit(2)}.*weightline verify"):
        view_chain(open_chain(hub_url))
    assert isinstance(CliRunner().invoke(app, ["gc", hub_url]).exception, StorageError)
    with pytest.raises(CommitConflictError):
        commit_state(Chain(open_hub(hub_url)), STATES[0], STATES[1], world_size=1)
    chain = open_chain(hub_url)
    plan = plan_gc(view_chain(chain, later(hours=25)))
    collect(chain, plan)
    assert len(plan.payloads) == 1  # of the attempt that lost
    assert verify_chain(Chain(open_hub(hub_url))).holds


def _stop_after_the_claim(hub: HubEmulator, url: str) -> None:
    """A writer of version 2 whose connection dies between its claim and the version."""
    batches: list[str] = []

    def plan(number: int, method: str, path: str) -> Fault | None:
        batches.extend([path] if path.endswith("/batch") else [])
        return Cut() if len(batches) > 2 else None  # the payload and the claim went through

    hub.fault_plan = plan
    with pytest.raises(TransientStorageError):
        commit_state(Chain(open_hub(url)), STATES[0], STATES[1], world_size=1)
    hub.fault_plan = None


def test_a_commit_that_is_repeated_after_an_outage_knows_itself(hub: HubEmulator, url: str, hurried: None) -> None:
    """The Hub goes away at request n of a commit, for longer than anybody asks again; later the same commit is made."""
    chain = _committed(url)
    outcomes = set()
    for number, failing in enumerate((0, 2, 3, 5, 7, 9, 30)):
        version = number + 2
        commit_id = new_commit_id()
        manifest = make_manifest(STATES[1], version, commit_id, (), is_anchor=False)
        hub.requests.clear()
        hub.fault_plan = lambda n, method, path, failing=failing: (  # type: ignore[misc]
            None if n < failing else LoseReply() if n == failing else Cut()
        )
        try:
            commit_manifest(Chain(open_hub(url)), manifest)
            outcomes.add("at once")
        except TransientStorageError:
            outcomes.add("unknown")
        hub.fault_plan = None
        commit_manifest(Chain(open_hub(url)), manifest)
        assert chain.manifest(version).commit_id == commit_id
        assert chain.tip_version() == version
    assert outcomes == {"at once", "unknown"}
    assert open_hub(url).contests() == ()


@pytest.mark.parametrize("faults", [(Cut(),), (LoseReply(),), (Status(503), Status(429))], ids=["cut", "lost", "busy"])
def test_one_failure_at_a_request_of_a_commit(
    hub: HubEmulator, url: str, hurried: None, faults: tuple[Fault, ...], request: pytest.FixtureRequest
) -> None:
    """Upload, commit and read back, through the store that users get.

    At every request where the two modes differ most: a claim that is cut, a gateway whose reply is lost. Else at five:
    tests/store/test_hub_claims.py does every request of a claim, for each fault.
    """
    chain = _committed(url)
    open_chain(url).store.put("warm", b"up")
    hub.requests.clear()
    commit_state(open_chain(url), STATES[0], STATES[1], world_size=1)
    num_requests = len(hub.requests)
    assert num_requests > 10
    is_whole = {"claims-cut", "s3-gateway-lost"} & {request.node.callspec.id}
    failures = list(range(num_requests)) if is_whole else [at * (num_requests - 1) // 4 for at in range(5)]
    for number, failing in enumerate(failures):
        version, fault = number + 3, faults[number % len(faults)]
        hub.requests.clear()
        hub.fault_plan = lambda n, method, path, failing=failing, fault=fault: (  # type: ignore[misc]
            fault if n == failing else None
        )
        commit_state(open_chain(url), STATES[version % 2], STATES[(version + 1) % 2], world_size=1)
        hub.fault_plan = None
    assert chain.tip_version() == len(failures) + 2
    report = verify_chain(Chain(open_hub(url)), is_deep=False)
    assert report.holds, report.findings


def test_the_hub_goes_away_at_any_request_of_a_commit(hub: HubEmulator, url: str, hurried: None) -> None:
    """From request n on nothing answers; then the trainer starts again from the tip that it finds."""
    _committed(url)
    hub.requests.clear()
    commit_state(Chain(open_hub(url)), STATES[0], STATES[1], world_size=1)
    num_requests = len(hub.requests)
    for number, failing in enumerate(range(0, num_requests, 2)):
        hub.requests.clear()
        hub.fault_plan = lambda n, method, path, failing=failing: Cut() if n >= failing else None  # type: ignore[misc]
        tip = number + 2
        try:
            commit_state(Chain(open_hub(url)), STATES[(tip + 1) % 2], STATES[tip % 2], world_size=1)
        except TransientStorageError:
            pass  # committed or not: the next line finds out
        hub.fault_plan = None
        chain = Chain(open_hub(url))
        if chain.tip_version() == tip:
            try:
                commit_state(chain, STATES[(tip + 1) % 2], STATES[tip % 2], world_size=1)
            except CommitConflictError:
                pass  # its own earlier claim had won, and is published now
        assert chain.tip_version() == tip + 1
    report = verify_chain(Chain(open_hub(url)))
    assert report.holds, report.findings
    tip = Chain(open_hub(url)).tip()
    state = read_state(chain, tip.version)
    assert all(np.array_equal(state.bits[n], b.reshape(-1)) for n, b in STATES[tip.version % 2].items())


def test_processes_race(hub: HubEmulator, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    race(url, commit_states)


def test_processes_race_while_replies_get_lost_and_listings_lag(
    hub: HubEmulator, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    writes, lost = itertools.count(), []

    def plan(number: int, method: str, path: str) -> Fault | None:
        is_write = path.endswith("/batch") or (method == "PUT" and "/s3/" in path)
        if is_write and next(writes) % 7 == 0:
            lost.append(path)
            return LoseReply()
        return None

    hub.fault_plan, hub.list_lag_seconds = plan, 0.15
    race(url, commit_states)
    assert len(lost) >= 3
