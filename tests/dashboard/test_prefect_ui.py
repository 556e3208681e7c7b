"""The way of a person through the Prefect UI: a deployment, its form, the run, the ranks' steps, the artifacts."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from uuid import UUID

import httpx
import pytest
from playwright.sync_api import Browser, Locator, Page, expect
from prefect.client.orchestration import SyncPrefectClient

from tests import ROOT
from tests.runs.recipes import write_recipe
from tests.waiting import wait_until
from weightline.deployments.server.artifacts import lineage_key
from weightline.deployments.server.deploy import deploy_all
from weightline.deployments.stack.folder import StackFolder, StackRecord

pytestmark = [pytest.mark.browser, pytest.mark.flows, pytest.mark.timeout(900)]

#: For what trains, and for what only has to be drawn.
_TRAIN_SECONDS = 600
_DRAW_MILLISECONDS = 90_000


def _flows(verb: str, runs_dir: Path, *arguments: str) -> None:
    argv = [sys.executable, "-m", "weightline", verb, "--runs-dir", str(runs_dir), *arguments]
    subprocess.run(argv, cwd=ROOT, check=True, capture_output=True, timeout=400)


@pytest.fixture
def runs_dir(tmp_path: Path) -> Path:
    return tmp_path / "runs"


@pytest.fixture
def stack(runs_dir: Path) -> Iterator[StackRecord]:
    """What `make up` starts, with everything deployed."""
    try:
        _flows("up", runs_dir, "--port", "0")
        record = StackRecord.load(StackFolder.under(runs_dir).record_path)
        assert record is not None
        yield record
    finally:
        _flows("down", runs_dir)


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    context = browser.new_context(viewport={"width": 1500, "height": 1100})
    page = context.new_page()
    page.set_default_timeout(_DRAW_MILLISECONDS)
    yield page
    context.close()


def _field(page: Page, label: str) -> Locator:
    """The form's input under a label: Prefect does not tie the two together."""
    return page.locator(
        f"xpath=//label[starts-with(normalize-space(.), '{label}')]/following::*[self::input or self::textarea][1]"
    )


def _wait_for_artifact(api_url: str, key: str) -> None:
    """Evaluation and serving draw it, after the run that committed."""
    deadline = time.monotonic() + _TRAIN_SECONDS
    while httpx.get(f"{api_url}/artifacts/{key}/latest", trust_env=False, timeout=60).status_code == 404:
        assert time.monotonic() < deadline, f"no artifact {key}"
        time.sleep(2)


def _wait_for_steps(api_url: str, names: Sequence[str]) -> None:
    """The server records the ranks' steps after the run that they belong to; the page does not ask for them again."""
    named = {"task_runs": {"name": {"any_": list(names)}}}

    def recorded() -> set[str]:
        answer = httpx.post(f"{api_url}/task_runs/filter", json=named, trust_env=False, timeout=60)
        return {run["name"] for run in answer.raise_for_status().json()}

    wait_until(recorded, lambda found: found == set(names))


def _fill_form(page: Page, ui_url: str, recipe: Path) -> None:
    """The way to the form of a training, with the recipe entered."""
    page.goto(f"{ui_url}/v2/deployments", timeout=_DRAW_MILLISECONDS)
    page.get_by_role("link", name="post-training", exact=True).first.click()
    page.get_by_role("button", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Custom run").click()
    for label in ("Recipe", "Stages", "Start from", "Run", "Folder of all runs", "Chain"):
        expect(page.locator("label", has_text=label).first).to_be_visible(timeout=_DRAW_MILLISECONDS)
    _field(page, "Recipe").fill(str(recipe))


def test_a_person_starts_a_training_from_its_form(
    server: str, client: SyncPrefectClient, page: Page, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is submitted is a run with the entered parameters. No worker is there to train."""
    monkeypatch.setenv("PREFECT_API_URL", server)
    deploy_all()
    recipe = write_recipe(tmp_path)
    _fill_form(page, server.removesuffix("/api"), recipe)
    page.get_by_role("button", name="Submit").click()
    page.get_by_role("link", name="View run").click()
    page.wait_for_url("**/runs/flow-run/*")
    run = client.read_flow_run(UUID(page.url.partition("/flow-run/")[2].partition("?")[0]))
    client.delete_flow_run(run.id)
    assert run.parameters["recipe"] == str(recipe)
    assert run.work_queue_name == "training"


@pytest.mark.nightly
@pytest.mark.train
def test_a_person_trains_from_the_ui_and_sees_what_came_of_it(
    stack: StackRecord, page: Page, runs_dir: Path, tmp_path: Path, picture: Callable[[Page, str], None]
) -> None:
    recipe = write_recipe(tmp_path, stages=[{"kind": "sft", "max_steps": 2, "learning_rate": 1e-3, "sync_steps": 1}])
    _fill_form(page, stack.ui_url, recipe)
    picture(page, "prefect-form")
    page.get_by_role("button", name="Submit").click()
    page.get_by_role("link", name="View run").click()

    expect(page.get_by_text("Completed", exact=True).first).to_be_visible(timeout=1000 * _TRAIN_SECONDS)
    steps = ("commit v1", "upload payload v1 r0", "upload payload v1 r1")
    _wait_for_steps(stack.api_url, (*steps, "commit v2"))
    page.get_by_role("tab", name="Subflow Runs").click()
    page.get_by_role("link", name=re.compile(r"^sft of toy")).first.click()
    page.get_by_role("tab", name="Task Runs").click()
    for step in steps:
        page.get_by_placeholder("Search by run name").last.fill(step)
        expect(page.get_by_text(step).first).to_be_visible(timeout=_DRAW_MILLISECONDS)
    page.get_by_placeholder("Search by run name").last.fill("")
    expect(page.get_by_text("commit v2").first).to_be_visible(timeout=_DRAW_MILLISECONDS)
    picture(page, "prefect-stage")
    page.get_by_role("tab", name="Artifacts").click()
    expect(page.get_by_text("optimizer steps").first).to_be_visible(timeout=_DRAW_MILLISECONDS)

    (chain,) = (path.parent for path in runs_dir.glob("*/bucket/*/commits"))
    key = lineage_key(chain.name)
    _wait_for_artifact(stack.api_url, key)
    page.goto(f"{stack.ui_url}/v2/artifacts/key/{key}", timeout=_DRAW_MILLISECONDS)
    page.get_by_role("link", name=re.compile(r"^[0-9a-f]{8}$")).first.click()
    expect(page.locator("svg.flowchart").first).to_be_visible(timeout=_DRAW_MILLISECONDS)
    expect(page.get_by_role("cell", name="v1", exact=False).first).to_be_visible()
    picture(page, "prefect-lineage")

    page.goto(f"{stack.dashboard_url}")
    expect(page.locator("#head h1")).to_have_text(chain.name, timeout=_DRAW_MILLISECONDS)
    expect(page.locator("#panel h2")).to_have_text("v2", timeout=_DRAW_MILLISECONDS)
