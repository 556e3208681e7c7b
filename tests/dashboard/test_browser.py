"""The page in a real browser: what a person sees, clicks and types."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from tests.chains import commit_state, random_state
from tests.dashboard.chains import HOSTILE, commit_step, model_shapes, record_life, trained
from tests.dashboard.conftest import Open, Serve
from weightline.chain import Chain, open_chain
from weightline.chain.read.records import SAMPLES, write_record
from weightline.dashboard.buckets import chain_id
from weightline.format import keys
from weightline.rollouts.record import Completion, Group, ReplicaWork, SamplesRecord, Spread, record_name
from weightline.rollouts.sample import Span

pytestmark = pytest.mark.browser

Picture = Callable[[Page, str], None]


def _selected(page: Page) -> str | None:
    return page.locator("#rail [aria-selected=true]").get_attribute("id")


def _counted(page: Page) -> None:
    """Wait until elements were counted."""
    expect(page.locator("#panel .heat-legend")).to_contain_text("of a tensor's elements")


def test_the_tip_is_shown_with_its_graph_curves_and_layers(open_page: Open, demo_url: str, picture: Picture) -> None:
    page = open_page(demo_url, width=1600, height=1150)
    expect(page.locator("#panel h2")).to_have_text("v28")
    expect(page.locator("#panel")).to_contain_text("revert to v25")
    for stage in ("sft", "dpo", "grpo"):
        expect(page.locator("#rail .stage-name", has_text=stage)).to_be_visible()
    assert page.locator("#rail .equals-edge").count() == 1
    assert page.locator("#rail .shortcut-edge").count() > 5
    expect(page.locator("#rail .fork-name")).to_have_text("qwen3-math-long")
    expect(page.locator("#version-28")).to_be_visible()
    titles = page.locator("#charts h3").all_inner_texts()
    assert titles[:3] == ["Score", "reward", "loss"] or titles[:3] == ["Score", "loss", "reward"]
    assert {"Changed", "Bytes of a delta", "Pause of serving", "Lag from commit to serving"} <= set(titles)
    page.locator("#version-25").click()
    expect(page.locator("#panel h2")).to_have_text("v25")
    _counted(page)
    expect(page.locator("#panel")).to_contain_text("400 problems")
    expect(page.locator("#panel")).to_contain_text("replica-1")
    link = page.get_by_role("link", name="Open the run")
    assert link.get_attribute("href") == "http://127.0.0.1:4200/runs/flow-run/0193a1b2-7c11-4f7e-9a55-6f1c2d3e4f50"
    expect(page.locator("#version-28")).to_be_visible()
    page.mouse.move(5, 5)
    picture(page, "dashboard")


def test_two_versions_are_compared_by_clicks(
    open_page: Open, demo: tuple[Chain, Chain], demo_url: str, picture: Picture
) -> None:
    page = open_page(f"{demo_url}/#/{chain_id(demo[0])}/v25", width=1600, height=1000)
    page.get_by_role("button", name="Compare with").click()
    page.locator("#version-15").click()
    expect(page.locator("#panel .versus")).to_contain_text("v15")
    expect(page.locator("#panel")).to_contain_text(re.compile(r"0\.844 . 0\.675|0\.675 . 0\.844"))
    _counted(page)
    expect(page.locator("#differing")).to_contain_text("tensors have other bits")
    page.get_by_role("button", name="Swap").click()
    expect(page).to_have_url(re.compile(r"v\d+\.\.v\d+$"))
    picture(page, "dashboard-compare")
    page.get_by_role("button", name="Close the comparison").click()
    expect(page.locator("#panel h2")).to_be_visible()


def test_the_chain_is_walked_by_keyboard_alone(open_page: Open, demo_url: str) -> None:
    page = open_page(demo_url)
    expect(page.locator("#panel h2")).to_have_text("v28")
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the chain")).to_be_focused()
    page.locator("#rail").focus()
    page.keyboard.press("ArrowLeft")
    expect(page.locator("#panel h2")).to_have_text("v27")
    assert page.locator("#rail").get_attribute("aria-activedescendant") == _selected(page) == "version-27"
    label = page.locator("#version-27").get_attribute("aria-label")
    assert label is not None
    assert label.startswith("Version 27, grpo, delta, milestone")
    page.keyboard.press("Home")
    expect(page.locator("#panel h2")).to_have_text("v0")
    expect(page.locator("#version-0")).to_be_visible()
    page.keyboard.press("ArrowLeft")
    expect(page.locator("#panel h2")).to_have_text("v0")
    page.keyboard.press("End")
    expect(page.locator("#panel h2")).to_have_text("v28")
    page.keyboard.press("c")
    page.keyboard.type("3")
    page.keyboard.press("Enter")
    expect(page.locator("#panel .versus")).to_contain_text("v3")
    page.locator("#rail").focus()
    page.keyboard.press("Escape")
    expect(page.locator("#panel h2")).to_have_text("v3")
    page.go_back()
    expect(page.locator("#panel .versus")).to_be_visible()


def test_light_and_dark_follow_the_system_until_they_are_switched(
    open_page: Open, demo_url: str, picture: Picture
) -> None:
    page = open_page(demo_url, scheme="dark", width=1600, height=1000)
    expect(page.locator("html")).to_have_attribute("data-theme", "dark")
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.locator("#version-25").click()
    expect(page.locator("#panel h2")).to_have_text("v25")
    _counted(page)
    picture(page, "dashboard-dark")
    page.emulate_media(color_scheme="light")
    expect(page.locator("html")).to_have_attribute("data-theme", "light")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != dark
    page.get_by_role("button", name="Switch to dark").click()
    page.reload()
    expect(page.locator("html")).to_have_attribute("data-theme", "dark")
    expect(page.get_by_role("button", name="Switch to light")).to_be_visible()


def test_a_narrow_window_has_everything_and_never_scrolls_sideways(
    open_page: Open, demo_url: str, picture: Picture
) -> None:
    page = open_page(demo_url, width=390, height=844)
    expect(page.locator("#panel h2")).to_have_text("v28")
    expect(page.locator("#charts figure").first).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    order = [page.locator(part).bounding_box() for part in ("#graph", "#panel", "#curves")]
    tops = [box["y"] for box in order if box]
    assert tops == sorted(tops)
    page.get_by_role("combobox", name="Chain", exact=True).select_option(label="qwen3-math-long")
    expect(page.locator("#head h1")).to_have_text("qwen3-math-long")
    expect(page.locator("#head")).to_contain_text("Forked from v15")
    page.get_by_role("combobox", name="Chain", exact=True).select_option(label="qwen3-math")
    page.locator("#version-25").click()
    expect(page.locator("#panel h2")).to_have_text("v25")
    _counted(page)
    picture(page, "dashboard-narrow")


def test_commits_evaluations_and_refreshes_appear_by_themselves(open_page: Open, serve: Serve, tmp_path: Path) -> None:
    chain = open_chain((tmp_path / "live").as_uri())
    state = random_state(0, model_shapes(2))
    url = serve(chain.url)
    page = open_page(url)
    expect(page.locator("#notices h2")).to_have_text("No version yet")
    expect(page.locator("#notices")).to_contain_text(f"weightline commit {chain.url} ./checkpoint")
    expect(page.locator("#live")).to_have_text("Live")
    commit_step(chain, state, None, is_milestone=True)
    expect(page.locator("#panel h2")).to_have_text("v0")
    newer = trained(state, 1, 0.05)
    commit_step(chain, newer, state)
    expect(page.locator("#panel h2")).to_have_text("v1")
    expect(page.locator("#panel")).to_contain_text("evaluation waiting")
    page.locator("#version-0").click()
    expect(page.locator("#panel h2")).to_have_text("v0")
    commit_step(chain, trained(newer, 2, 0.05), newer)
    expect(page.locator("#version-2")).to_be_visible()
    expect(page.locator("#panel h2")).to_have_text("v0")
    record_life(chain, 0, 0.625, 1.0)
    expect(page.locator("#panel")).to_contain_text("0.625")
    page.get_by_role("button", name="Follow the tip").click()
    expect(page.locator("#panel h2")).to_have_text("v2")


def test_text_from_a_bucket_is_never_markup(open_page: Open, serve: Serve, tmp_path: Path) -> None:
    chain = open_chain((tmp_path / "hostile").as_uri())
    state = random_state(0, {f"model.layers.0.{HOSTILE}.weight": (8, 8), HOSTILE: (4,)})
    hostile = {
        "stage": HOSTILE, "run_id": HOSTILE, "coding": HOSTILE, "metrics": {HOSTILE: 1.0, "loss": 2.0},
        "provenance": {HOSTILE: HOSTILE, "flow_run_url": "javascript:window.hacked=1", "flow_run_id": HOSTILE},
        "created_at": HOSTILE,
    }  # fmt: skip
    commit_step(chain, state, None, **hostile)
    commit_step(chain, trained(state, 1, 0.5), state, **hostile)
    record = '{"status": "<b>done", "score": "1<script>", "reason": "<img src=x onerror=window.hacked=1>"}'
    chain.store.put_if_absent(keys.record("evaluations", 1, "task"), record.encode())
    chain.store.put_if_absent(keys.record("refreshes", 1, "replica"), b'{"status": ["<script>"], "served_at": {}}')
    chain.store.put_if_absent(keys.record("evaluations", 1, "torn"), b'{"status": "do')
    url = serve(chain.url, prefect_ui="http://127.0.0.1:4200")
    page = open_page(url)
    expect(page.locator("#panel h2")).to_have_text("v1")
    expect(page.locator("#panel .badge.stage")).to_have_text(HOSTILE)
    page.locator("#rail .version").first.hover()
    page.evaluate("document.querySelectorAll('details').forEach((fold) => { fold.open = true; })")
    page.locator("#add-curve").select_option(HOSTILE)
    expect(page.locator("#charts h3", has_text="onerror")).to_be_visible()
    page.get_by_role("button", name="Compare with").click()
    page.locator("#version-0").click()
    expect(page.locator("#panel .versus")).to_be_visible()
    assert page.evaluate("window.hacked === undefined")
    assert page.locator("img, script:not([src])").count() == 0
    assert page.locator("a[href^='javascript']").count() == 0


def test_the_samples_of_a_version_are_read_when_it_is_opened_and_are_text(
    open_page: Open, serve: Serve, tmp_path: Path
) -> None:
    chain = open_chain((tmp_path / "rolled").as_uri())
    state = random_state(0, model_shapes(2))
    metrics = {"rollout/staleness_mean": 1.25, "rollout/wait_seconds": 0.5}
    commit_step(chain, state, None, stage="grpo", metrics=metrics)
    for step in range(1, 4):
        before, state = state, trained(state, step, 0.05)
        commit_step(chain, state, before, stage="grpo", metrics=metrics)
    completions = (
        Completion(f"first line\nsecond line {HOSTILE}", 1.0, (Span(1, 12), Span(2, 3))),
        Completion("", 0.0, (Span(2, 1),)),
    )
    record = SamplesRecord(
        3, Spread(mean=1.25, max=2.0), 0.5, 1.5, num_regenerated=4, queue_length=1, made_by={1: 6, 2: 2},
        replicas={HOSTILE: ReplicaWork(6, 1.5), "replica-1": ReplicaWork(2)}, ratio=Spread(1.0, 0.5, 1.5),
        groups=(Group(f"2+3= {HOSTILE}", completions, 8),),
    )  # fmt: skip
    write_record(chain, SAMPLES, 3, record_name("grpo", 3), record.to_record())
    url = serve(chain.url)
    page = open_page(url)
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    samples = page.locator("#samples")
    expect(samples.locator("h3")).to_have_text("Samples of step 3")
    for text in ("1.250", "versions, at most 2", "0.5000 to 1.500", "4 generated again", "6 of 8", "4 a second"):
        expect(samples).to_contain_text(text)
    expect(page.locator("#charts h3", has_text="rollout/staleness_mean")).to_be_visible()
    expect(samples.locator(".sample")).to_have_count(2)
    expect(samples.locator(".sample").first).to_be_hidden()
    samples.get_by_text("Prompts and completions (1)").click()
    first = samples.locator(".sample").first
    expect(first).to_be_visible()
    assert first.locator(".sample-text").evaluate("(element) => element.textContent") == completions[0].text
    assert samples.locator(".sample-text").first.evaluate("(element) => element.childElementCount") == 0
    expect(first.locator(".badge")).to_have_text(["reward 1", "v112 tokens", "v23 tokens"])
    expect(samples).to_contain_text("and 6 more completions")
    assert page.evaluate("window.hacked === undefined")
    assert page.locator("img, script:not([src])").count() == 0
    samples.get_by_role("link", name="v1", exact=True).click()
    expect(page.locator("#panel h2")).to_have_text("v1")
    expect(page.locator("#samples")).to_be_hidden()
    # Those of the versions that were opened, and of no other. The first may have been asked for before the listener.
    assert {one.rpartition("/versions/")[2] for one in asked if one.endswith("/rollouts")} - {"3/rollouts"} == {
        "1/rollouts"
    }


def test_a_broken_chain_says_what_is_broken_and_shows_the_rest(open_page: Open, serve: Serve, broken: Chain) -> None:
    url = serve(broken.url)
    page = open_page(f"{url}/#/{chain_id(broken)}")
    expect(page.locator("#panel h2")).to_have_text("v6")
    expect(page.locator("#notices")).to_contain_text("Version 2 is broken.")
    expect(page.locator("#notices")).to_contain_text("manifest field base_version: Field required")
    expect(page.locator("#notices")).to_contain_text("v4: later versions may not be reachable")
    assert page.locator("#version-2").get_attribute("aria-label") == "Version 2, broken"
    assert page.locator("#version-4").count() == 0


def test_a_bucket_that_cannot_be_reached_is_told_as_such(open_page: Open, serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    url = serve((tmp_path / "file").as_uri())
    page = open_page(url)
    expect(page.locator("#notices h2")).to_have_text("This bucket cannot be reached")
    expect(page.locator("#notices")).to_contain_text("Not a directory")


def test_a_link_to_a_chain_that_is_not_here_shows_no_other(open_page: Open, serve: Serve, broken: Chain) -> None:
    url = serve(broken.url)
    page = open_page(f"{url}/#/gamma-abc123/v2")
    expect(page.locator("#head")).to_contain_text("There is no chain gamma-abc123 here")
    expect(page.locator("#panel")).to_be_hidden()
    expect(page.locator("#graph")).to_be_hidden()
    page.get_by_role("link", name="Show the first chain").click()
    expect(page.locator("#panel h2")).to_have_text("v6")
    page.evaluate("location.hash = '#/gamma-abc123/v2'")
    expect(page.locator("#head h1")).to_have_text("No chain")
    expect(page.locator("#graph")).to_be_hidden()


def test_chains_that_are_left_out_are_counted(
    open_page: Open, serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("weightline.dashboard.buckets.MAX_CHAINS", 2)
    for number in range(5):
        commit_state(open_chain((tmp_path / str(number)).as_uri()), random_state(number))
    page = open_page(serve(f"{tmp_path}/"))
    expect(page.locator("#sidebar a")).to_have_count(2)
    expect(page.locator("#sidebar")).to_contain_text("3 older chains are not shown")
