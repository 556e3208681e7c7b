"""What only the machine can know of a form's values: refused before any work, with the field's name."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prefect.flows import Flow

from tests.chains import commit_state, nudged, random_state
from tests.runs.recipes import write_recipe
from weightline.chain import open_chain
from weightline.errors import InputError, TransientStorageError, VersionNotFoundError, WeightlineError
from weightline.flows.maintain_chain import maintain_chain
from weightline.flows.post_training import post_training
from weightline.flows.publish_model import publish_model
from weightline.flows.reconcile import reconcile
from weightline.flows.serving_refresh import refresh_serving
from weightline.flows.version_eval import evaluate_version
from weightline.runs import checks as form_checks
from weightline.runs.checks import check_form
from weightline.runs.prepare import prepare_run

CHAIN = "memory://form-checks"


@pytest.fixture(autouse=True)
def _chain() -> Iterator[None]:
    chain = open_chain(CHAIN)
    if chain.tip_version() is None:
        state = random_state(0)
        commit_state(chain, state, is_milestone=True)
        commit_state(chain, nudged(state, 1), state)
    return


def test_an_error_keeps_its_kind_and_gets_the_field() -> None:
    with pytest.raises(VersionNotFoundError, match=r"^version: no 9$") as caught, check_form("version"):
        raise VersionNotFoundError("no 9", version=9)
    assert caught.value.facts == {"version": 9, "field": "version"}
    with pytest.raises(InputError, match=r"^chain: known$"), check_form("chain"):
        raise InputError("chain: known")
    with pytest.raises(InputError, match=r"^folder: .*read-only"), check_form("folder"):
        raise OSError(30, "read-only")


@pytest.mark.parametrize(
    ("parameters", "field"),
    [
        ({"start_from": "file:///chain@"}, "start_from"),
        ({"start_from": "./no-such-folder"}, "start_from"),
        ({"start_from": f"{CHAIN}@99"}, "start_from"),
        ({"chain_url": "ftp://x/y"}, "chain"),
        ({"chain_url": "/proc/nope"}, "chain"),
        ({"runs_dir": "/proc/nope"}, "runs_dir"),
        ({"recipe_path": None}, "recipe"),
        ({"recipe_path": None, "run_id": "no-such"}, "run_id"),
        ({"recipe_path": "no-such.yaml"}, "recipe"),
    ],
)
def test_a_run_that_cannot_be_is_refused_by_field(tmp_path: Path, parameters: dict[str, Any], field: str) -> None:
    given = {"recipe_path": write_recipe(tmp_path), "runs_dir": tmp_path / "runs", **parameters}
    with pytest.raises(WeightlineError, match=rf"^{field}: (?!no object)"):
        prepare_run(**given)
    assert not list((tmp_path / "runs").glob("*/run.json"))


def test_a_model_of_the_recipe_is_told_by_the_recipe_s_field(tmp_path: Path) -> None:
    with pytest.raises(WeightlineError, match=r"^model\.path"):
        prepare_run(write_recipe(tmp_path, model={"path": "./no-such-folder"}), tmp_path / "runs")


def test_a_bucket_that_is_not_there_is_told_soon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"ENDPOINT_URL": "http://127.0.0.1:9", "ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    began_at = time.monotonic()
    with pytest.raises(TransientStorageError, match=r"^chain: s3://nobody/x"):
        prepare_run(write_recipe(tmp_path), tmp_path / "runs", chain_url="s3://nobody/x", patience_seconds=0.5)
    assert time.monotonic() - began_at < 60.0
    assert form_checks.PATIENCE_SECONDS <= 10.0


@pytest.mark.parametrize(
    ("flow", "parameters", "field"),
    [
        (post_training, {"chain": "ftp://x/y"}, "chain"),
        (evaluate_version, {"chain": "ftp://x", "version": 0}, "chain"),
        (evaluate_version, {"chain": "/nope/zz", "version": 0}, "chain"),
        (evaluate_version, {"chain": CHAIN, "version": 99}, "version"),
        (evaluate_version, {"chain": CHAIN, "version": 0}, "task"),
        (evaluate_version, {"chain": CHAIN, "version": 0, "task": "no_such_task"}, "task"),
        (refresh_serving, {"chain": "/nope/zz", "version": 0}, "chain"),
        (refresh_serving, {"chain": CHAIN, "version": 99}, "version"),
        (maintain_chain, {"chain": "ftp://x"}, "chain"),
        (maintain_chain, {"chain": "/nope/zz"}, "chain"),
        (publish_model, {"chain": CHAIN}, "folder"),
        (publish_model, {"chain": "/nope/zz", "folder": "o"}, "chain"),
        (publish_model, {"chain": CHAIN, "version": "nope", "folder": "o"}, "version"),
        (publish_model, {"chain": CHAIN, "folder": "/proc/x/y"}, "folder"),
        (publish_model, {"chain": CHAIN, "folder": "full"}, "folder"),
        (reconcile, {"chains": ["ftp://x"]}, "chains"),
        (reconcile, {"runs_dir": "/nope"}, "runs_dir"),
    ],
)
def test_a_flow_tells_the_field(
    server: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    flow: Flow[Any, Any],
    parameters: dict[str, Any],
    field: str,
) -> None:
    recipe = write_recipe(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "other").touch()
    if flow is post_training:
        parameters = {"recipe": str(recipe), **parameters}
    with pytest.raises(Exception, match=rf"^{field}\b.*: "):
        flow(**parameters)
