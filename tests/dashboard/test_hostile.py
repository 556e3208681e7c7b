"""Whatever writers left in buckets: every chain of the page is shown, and what a browser gets is bounded."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.chains import commit_state, nudged, random_state
from tests.dashboard.conftest import served
from weightline.chain import Chain, open_chain
from weightline.chain.read.records import EVALUATIONS, REFRESHES, SAMPLES
from weightline.dashboard import app as app_module
from weightline.dashboard.board import Board
from weightline.dashboard.buckets import chain_id
from weightline.dashboard.plain import MAX_TEXT, PlainResponse, plain
from weightline.dashboard.records import finite
from weightline.format import keys
from weightline.format.manifest import Manifest
from weightline.lineage.rows import row_of

HUGE = 10**400
Damage = Callable[[Chain], None]


def _grown(url: str) -> Chain:
    chain = open_chain(url)
    state = random_state(0)
    commit_state(chain, state)
    for seed in range(1, 5):
        before, state = state, nudged(state, seed)
        commit_state(chain, state, before)
    return chain


def _manifest_says(**fields: Any) -> Damage:
    def damage(chain: Chain) -> None:
        document = json.loads(chain.store.get(keys.commit(3)))
        chain.store.put(keys.commit(3), json.dumps(document | fields).encode())

    return damage


def _evaluation_says(**fields: Any) -> Damage:
    def damage(chain: Chain) -> None:
        for version in (1, 2, 3):
            document = {"version": version, "name": "x", "status": "done"} | fields
            chain.store.put(keys.record(EVALUATIONS, version, "x"), json.dumps(document).encode())

    return damage


def _objects(**bodies: bytes) -> Damage:
    places = {
        "lease": keys.lease("r"), "horizon": f"{keys.HISTORY}{keys.padded(0)}.json", "ref": keys.ref("x", 0),
        "refresh": keys.record(REFRESHES, 2, "r"), "samples": keys.record(SAMPLES, 2, "grpo-2"),
    }  # fmt: skip

    def damage(chain: Chain) -> None:
        for name, body in bodies.items():
            chain.store.put(places[name], body)

    return damage


LEASE = {
    "replica": "r", "holder": "h", "engine": "e\ud800", "host": "h" * 10**6, "pid": HUGE, "release": "1",
    "version": HUGE, "state": "serving", "renewed_at": "x", "expires_at": "x", "ttl_seconds": 5,
}  # fmt: skip
STAMP = {"kind": SAMPLES, "version": 2, "name": "grpo-2", "status": "done"}
GROUPS = [{"prompt": "p" * 10**4, "completions": [{"text": "t" * 10**4, "spans": [[1, 1]] * 999}] * 40}] * 9
COUNTS = {str(number): HUGE if number % 2 else 1 for number in range(10**4)}
DAMAGES: dict[str, Damage] = {
    "stage that is no text": _manifest_says(stage="\ud800"),
    "stage of 20 MB": _manifest_says(stage="B" * 20_000_000, run_id="A" * 20_000_000),
    "step of 400 digits": _manifest_says(global_step=HUGE),
    "sizes of 400 digits": _manifest_says(payload_nbytes=HUGE, full_nbytes=HUGE + 1),
    "metrics at the edge": _manifest_says(metrics={"a": 1e308, "b": -1e308, "\udfff": 0.5}),
    "provenance that is no text": _manifest_says(provenance={"\ud800": "\udfff", "flow_run_url": "http://\ud800"}),
    "time that is no text": _manifest_says(created_at="\ud800"),
    "no manifest": _manifest_says(kind=7),
    "score of 400 digits": _evaluation_says(score=HUGE, metrics={"x": HUGE}),
    "scores whose sum is no float": _evaluation_says(score=17 * 10**307),
    "scores whose sum is infinite": _evaluation_says(score=1.7e308),
    "reason that is no text": _evaluation_says(status="failed", reason="\udcff" * 10**6),
    "lease": _objects(lease=json.dumps(LEASE).encode()),
    "horizon and ref beyond numbers": _objects(
        horizon=b'{"oldest_kept": 1e300, "created_at": "x"}', ref=b'{"name": "x", "version": 1e400}'
    ),
    "refresh": _objects(refresh=b'{"served_at": "\\ud800", "pause_seconds": 1e999, "status": "done"}'),
    "not JSON": _objects(lease=b"\xff", ref=b"[" * 10**5, refresh=b"7", samples=b"[" * 10**5),
    "samples of other types": _objects(samples=json.dumps(STAMP | {"staleness": [1], "groups": {"a": 1}}).encode()),
    "samples without end": _objects(samples=json.dumps(STAMP | {"groups": GROUPS, "made_by": COUNTS}).encode()),
    "samples of 400 digits": _objects(samples=json.dumps(STAMP | {"wait_seconds": HUGE}).encode()),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_no_object_takes_the_page_down(name: str) -> None:
    damaged, good = _grown(f"memory://hostile-{name}/damaged"), _grown(f"memory://hostile-{name}/good")
    DAMAGES[name](damaged)
    identifier = chain_id(damaged)
    with (
        served([damaged.url, good.url], poll_seconds=0.05) as url,
        httpx.Client(base_url=url, trust_env=False, timeout=120) as api,
    ):
        cards = _settled(api)
        assert set(cards) == {identifier, chain_id(good)}
        assert (cards[chain_id(good)]["state"], cards[chain_id(good)]["num_broken"]) == ("ready", 0)
        assert (cards[identifier]["state"], cards[identifier]["tip"]) == ("ready", 4)
        for path in (
            "/api/chains", f"/api/chains/{identifier}/glance", f"/api/chains/{identifier}/window?first=0&last=10",
            f"/api/chains/{identifier}/versions/2", f"/api/chains/{identifier}/versions/3",
            f"/api/chains/{identifier}/compare?a=1&b=3", f"/api/chains/{identifier}/versions/2/rollouts",
            f"/api/chains/{identifier}/series?name=a&name=weightline:score&points=2",
        ):  # fmt: skip
            answer = api.get(path)
            # A version whose manifest is refused is told with its reason; nothing is a server error.
            assert answer.status_code in (200, 501, 502), (path, answer.text)
            assert answer.status_code == 200 or "versions/3" in path or "compare" in path
            assert "error" in answer.json() or answer.status_code == 200
            assert len(answer.content) < 300_000, path


def _settled(api: httpx.Client) -> dict[str, Any]:
    """The cards once every chain was read."""
    from tests.waiting import wait_until

    def read() -> dict[str, Any]:
        return {card["id"]: card for card in api.get("/api/chains").json()["chains"]}

    return wait_until(read, lambda cards: all(c["state"] != "loading" and not c["num_pending"] for c in cards.values()))


def test_a_chain_that_cannot_be_drawn_says_so_on_its_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = _grown((tmp_path / "first").as_uri()), _grown((tmp_path / "second").as_uri())
    card = app_module.card

    def failing(identifier: str, name: str, url: str, snapshot: Any) -> Any:
        if name == "first":
            raise ZeroDivisionError("of a kind that was not foreseen")
        return card(identifier, name, url, snapshot)

    monkeypatch.setattr(app_module, "card", failing)
    board = Board([first.url, second.url])
    try:
        shown = [app_module.safe_card(identifier, index) for identifier, index in board.indexes.items()]
    finally:
        board.close()
    assert [(one["name"], one["state"]) for one in shown] == [("first", "unreachable"), ("second", "loading")]
    assert shown[0]["problem"] == f"{first.url} cannot be shown: of a kind that was not foreseen"


def test_plain_documents_can_always_be_encoded() -> None:
    document = {
        "text": "\ud800" * 3, 7: ("x" * 10**6, None, True), "numbers": [math.inf, math.nan, HUGE, -HUGE, 0.5, 3],
    }  # fmt: skip
    told = json.loads(PlainResponse(document).body)
    assert told["text"] == "???"
    assert len(told["7"][0]) == MAX_TEXT
    assert told["7"][1:] == [None, True]
    assert told["numbers"] == [None, None, 2**63 - 1, -(2**63) + 1, 0.5, 3]
    assert plain({"a": [1, "b"]}) == {"a": [1, "b"]}


def test_numbers_of_records_are_finite_and_safe_to_add() -> None:
    assert [finite(value) for value in (HUGE, math.inf, True, "1", None)] == [None] * 5
    assert [finite(value) for value in (3, 0.5, -(2**53))] == [3, 0.5, -(2**53)]
    assert isinstance(finite(10**300), float)


def test_a_row_in_memory_is_bounded() -> None:
    from weightline.dashboard.plain import plain_row

    chain = _grown("memory://hostile-row/x")
    raw = json.loads(chain.manifest(1).to_bytes()) | {
        "stage": "B" * 1024, "metrics": {f"m{number}": 0.5 for number in range(2000)},
    }  # fmt: skip
    row = plain_row(row_of(Manifest.from_bytes(json.dumps(raw).encode())))
    assert len(row.stage) == 200
    assert len(row.metrics) == 500
