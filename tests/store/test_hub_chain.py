"""A whole chain in a Hub bucket: racing writers, a network that fails, and what `weightline verify` says."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from tests.chains import commit_state, nudged, random_state
from tests.hub_emulator import Cut, Fault, HubEmulator, LoseReply, Status
from tests.store.hub_racers import race
from weightline.chain import Chain, open_chain
from weightline.chain.state import read_state
from weightline.chain.verify import verify_chain
from weightline.cli.main import app
from weightline.errors import CommitConflictError, TransientStorageError
from weightline.store.hub import open_hub

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


@pytest.mark.slow
@pytest.mark.parametrize("faults", [(Cut(),), (LoseReply(),), (Status(503), Status(429))], ids=["cut", "lost", "busy"])
def test_one_failure_at_any_request_of_a_commit(
    hub: HubEmulator, url: str, hurried: None, faults: tuple[Fault, ...]
) -> None:
    """Upload, commit and read back, through the store that users get."""
    chain = _committed(url)
    open_chain(url).store.put("warm", b"up")
    hub.requests.clear()
    commit_state(open_chain(url), STATES[0], STATES[1], world_size=1)
    num_requests = len(hub.requests)
    assert num_requests > 10
    for failing in range(num_requests):
        version, fault = failing + 3, faults[failing % len(faults)]
        hub.requests.clear()
        hub.fault_plan = lambda number, method, path, failing=failing, fault=fault: (  # type: ignore[misc]
            fault if number == failing else None
        )
        commit_state(open_chain(url), STATES[version % 2], STATES[(version + 1) % 2], world_size=1)
        hub.fault_plan = None
    assert chain.tip_version() == num_requests + 2
    report = verify_chain(Chain(open_hub(url)), is_deep=False)
    assert report.holds, report.findings


@pytest.mark.slow
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


@pytest.mark.slow
def test_processes_race(hub: HubEmulator, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    race(url)


@pytest.mark.slow
def test_processes_race_while_replies_get_lost_and_listings_lag(
    hub: HubEmulator, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    lost: list[str] = []

    def plan(number: int, method: str, path: str) -> Fault | None:
        is_write = path.endswith("/batch") or (method == "PUT" and "/s3/" in path)
        if is_write and number % 7 == 0:
            lost.append(path)
            return LoseReply()
        return None

    hub.fault_plan, hub.list_lag_seconds = plan, 0.15
    race(url)
    assert len(lost) > 3
