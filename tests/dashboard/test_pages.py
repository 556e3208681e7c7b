"""Snapshots become documents: pure functions, told apart from any server."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from tests.chains import make_manifest, random_state
from tests.lineage.rows import row
from weightline.dashboard.detail import run_url, state_digest
from weightline.dashboard.layers import TensorChange, layer_picture, place_of
from weightline.dashboard.pages import card, glance, window
from weightline.dashboard.records import parse_record
from weightline.dashboard.series import OWN_SERIES, series
from weightline.dashboard.snapshot import Snapshot
from weightline.evaluation.checkpoint import state_digest as recorded_state_digest

UUID = "0193a1b2-7c11-4f7e-9a55-6f1c2d3e4f50"


def _snapshot(number: int) -> Snapshot:
    rows = [row(v, kind="delta" if v else "anchor", stage="sft" if v < number // 2 else "grpo") for v in range(number)]
    return Snapshot(state="ready", versions=tuple(range(number)), rows=tuple(rows))


def test_documents_of_a_long_chain_are_bounded() -> None:
    snapshot = _snapshot(10_000)
    assert len(glance(snapshot, 400)["bins"]) == 400
    assert len(series(snapshot.rows, list(OWN_SERIES), 500)["versions"]) == 500
    assert len(json.dumps(card("c", "c", "memory://c", snapshot))) < 5_000
    shown = window(snapshot, 9_000, 9_024, {9_001: ["fork"]})
    assert [node["version"] for node in shown["nodes"]] == list(range(9_000, 9_025))
    assert shown["edges"][0] == ["delta", 8_999, 9_000]
    assert shown["nodes"][1]["forks"] == ["fork"]


@given(st.integers(0, 60), st.integers(1, 20))
def test_bins_cover_every_version_once(number: int, max_bins: int) -> None:
    told = glance(_snapshot(number), max_bins)
    assert len(told["bins"]) <= max_bins
    if number:
        firsts = [part["first"] for part in told["bins"]]
        assert firsts == list(range(0, number, told["bin_size"]))


def test_a_binned_curve_keeps_its_range() -> None:
    scores = [0.1, 0.9, None, 0.5, None, None]
    rows = [row(version, score=score) for version, score in enumerate(scores)]
    told = series(rows, ["weightline:score"], 3)
    assert told["versions"] == [1, 3, 5]
    assert told["series"]["weightline:score"] == {
        "mean": [0.5, 0.5, None],
        "min": [0.1, 0.5, None],
        "max": [0.9, 0.5, None],
    }
    assert "min" not in series(rows, ["weightline:score"], 6)["series"]["weightline:score"]


def test_bytes_and_changes_of_anchors_do_not_dwarf_those_of_deltas() -> None:
    rows = [row(0, kind="anchor", num_changed=1000), row(1)]
    told = series(rows, ["weightline:changed", "weightline:bytes"], 10)["series"]
    assert told["weightline:changed"]["mean"] == [None, 0.01]
    assert told["weightline:bytes"]["mean"] == [None, 1234]


def test_lag_is_from_commit_to_the_first_answer() -> None:
    served = row(1, created_at="2026-01-01T00:00:00.000Z", served_at="2026-01-01T00:00:02.500Z")
    assert served.lag_seconds == 2.5
    assert row(1, created_at="yesterday", served_at="2026-01-01T00:00:00Z").lag_seconds is None
    assert row(1).lag_seconds is None


def test_tensors_have_their_place_in_the_model() -> None:
    assert place_of("model.layers.12.self_attn.q_proj.weight") == (12, "self_attn.q_proj")
    assert place_of("model.layers.3.mlp.experts.17.up_proj.weight") == (3, "mlp.experts.up_proj")
    assert place_of("transformer.h.0.attn.c_attn.bias") == (0, "attn.c_attn.bias")
    assert place_of("model.embed_tokens.weight") == (None, "model.embed_tokens")
    changes = [
        TensorChange("model.layers.1.mlp.experts.0.up.weight", 100, True, 10),
        TensorChange("model.layers.1.mlp.experts.1.up.weight", 300, False, 0),
        TensorChange("model.layers.0.norm.weight", 4, False, None),
        TensorChange("lm_head.weight", 50, True, None),
    ]
    told = layer_picture(changes)
    assert told["columns"] == ["mlp.experts.up", "norm"]
    assert [layer["layer"] for layer in told["layers"]] == [0, 1]
    assert told["layers"][1]["cells"] == [
        {"num_tensors": 2, "num_different": 1, "num_elements": 400, "num_changed": 10},
        None,
    ]
    assert told["outside"][0]["name"] == "lm_head"
    assert told["outside"][0]["num_changed"] is None


def test_a_run_links_to_a_web_page_or_nowhere() -> None:
    def url(ui: str | None, **provenance: str) -> str | None:
        manifest = make_manifest(random_state(0), 0, "0" * 32, (), is_anchor=True)
        return run_url(manifest.model_copy(update={"provenance": provenance}), ui)

    assert url("http://host:4200/", flow_run_id=UUID) == f"http://host:4200/runs/flow-run/{UUID}"
    assert url(None, flow_run_id=UUID) is None
    assert url("http://host", flow_run_id="../../x") is None
    assert url(None, flow_run_url="https://prefect.example/runs/1") == "https://prefect.example/runs/1"
    for hostile in ("javascript:alert(1)", "data:text/html,x", 'https://x" onclick="y', "//evil"):
        assert url(None, flow_run_url=hostile) is None


def test_the_state_digest_is_the_one_that_evaluations_record() -> None:
    manifest = make_manifest(random_state(0), 0, "0" * 32, (), is_anchor=True)
    assert state_digest(manifest) == recorded_state_digest(manifest.digests)


def test_records_become_plain_documents_whatever_was_written() -> None:
    key = "records/evaluations/00000000000000000003/task.json"
    told = parse_record(
        key, b'{"version": 9, "status": "done", "score": 0.5, "metrics": {"a": 1, "b": "x"}, "extra": []}'
    )
    assert told == {"version": 3, "name": "task", "status": "done", "score": 0.5, "metrics": {"a": 1}}
    assert parse_record(key, b'{"score": NaN, "pause_seconds": true, "served_at": 3}') == {
        "version": 3, "name": "task", "status": "unknown",
    }  # fmt: skip
    for raw in (b"[]", b"", b"{", b"\xff", b"[" * 100_000):
        assert parse_record(key, raw) is None
    assert parse_record("records/evaluations/3/task.json", b"{}") is None
