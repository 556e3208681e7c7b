"""The page of a stage: pace, curves and commits, from what the trainer logs and the bucket holds."""

from __future__ import annotations

import base64
import math
from dataclasses import replace
from xml.etree import ElementTree

from tests.chains import commit_state, nudged, random_state
from weightline.chain import open_chain
from weightline.chain.read.records import SAMPLES, write_record
from weightline.format import keys
from weightline.lineage.read import read_lineage
from weightline.lineage.samples import newest_samples
from weightline.rollouts.record import ReplicaWork, SamplesRecord, Spread, record_name
from weightline.runs.curves import curve_image, curve_svg, points_of, thinned
from weightline.runs.stage_page import Pace, headline, stage_markdown

HISTORY = [{"step": step, "loss": 2.0 / step, "reward": 0.1 * step} for step in range(1, 11)]


def test_a_metric_is_followed_over_its_steps() -> None:
    history = [*HISTORY, {"step": 4, "loss": 9.0}, {"step": 11, "loss": math.nan}, {"train_runtime": 3.0}]
    points = points_of(history, "loss")
    assert [step for step, _ in points] == list(range(1, 11))
    assert points[3] == (4.0, 9.0)  # logged again after a resume
    assert points_of(history, "kl") == []


def test_a_curve_is_a_picture_with_its_values_on_it() -> None:
    svg = ElementTree.fromstring(curve_svg("Loss <b>", points_of(HISTORY, "loss")))
    texts = [element.text for element in svg.iter() if element.tag.endswith("text")]
    assert texts == ["Loss <b>: 0.2 at step 10", "2", "0.2", "1", "10"]
    (line,) = (element for element in svg.iter() if element.tag.endswith("polyline"))
    corners = [tuple(map(float, corner.split(","))) for corner in line.attrib["points"].split()]
    assert len(corners) == 10
    assert corners[0][1] < corners[-1][1]  # it falls, and y grows downwards
    image = curve_image("Loss", points_of(HISTORY, "loss"))
    assert base64.b64decode(image.partition("base64,")[2].rstrip(")")).startswith(b"<svg")
    assert curve_image("Loss", [(1.0, 2.0)]) == ""
    assert "polyline" in curve_svg("Flat", [(1.0, 2.0), (2.0, 2.0)])


def test_many_points_are_thinned_and_the_last_one_stays() -> None:
    points = [(float(step), float(step % 2)) for step in range(10_001)]
    shown = thinned(points, 400)
    assert len(shown) <= 400
    assert shown[-1] == points[-1]
    assert all(value == 0.5 for _, value in thinned(points[:4001], 401)[:-1])
    assert thinned(points[:3], 400) == points[:3]


def test_the_pace_is_that_of_the_last_minute() -> None:
    pace = Pace()
    assert pace.steps_per_second is None
    for second in range(200):
        pace.observe(float(second), 2 * second if second < 100 else 200 + second - 100)
    assert pace.steps_per_second == 1.0
    pace.observe(200.0, 5)  # resumed from an earlier step
    assert pace.steps_per_second is None
    assert headline(5, 10, None) == "step 5 of 10"
    assert headline(5, 10, 2.5) == "step 5 of 10, 2.50 steps/s, 2 s to go"
    assert headline(10, 10, 0.05) == "step 10 of 10, 20 s/step"


def test_the_page_has_curves_and_commits() -> None:
    chain = open_chain("memory://paged")
    state = random_state(0)
    commit_state(chain, state)
    commit_state(chain, nudged(state, 1), state)
    page = stage_markdown("sft of x", 10, 20, 1.0, HISTORY, read_lineage(chain))
    assert page.startswith("**sft of x**: step 10 of 20")
    assert [word in page for word in ("![Loss]", "![Reward]", "![Entropy]")] == [True, True, False]
    assert page.index("| v1 |") < page.index("| v0 |")
    assert stage_markdown("sft of x", 0, 20, None, [], ()) == "**sft of x**: step 0 of 20\n"


def test_the_page_of_a_stage_with_rollouts_says_what_made_its_samples() -> None:
    chain = open_chain("memory://paged-samples")
    state = random_state(0)
    commit_state(chain, state)
    commit_state(chain, nudged(state, 1), state)
    record = SamplesRecord(
        9, Spread(mean=1.25, max=2.0), 0.5, queue_length=1, made_by={0: 6, 1: 2}, ratio=Spread(1.0, 0.5, 1.5),
        replicas={"replica|<b>": ReplicaWork(8, 2.0), "replica-1": ReplicaWork(3)},
    )  # fmt: skip
    for step in (8, 9):
        write_record(chain, SAMPLES, 0, record_name("grpo", step), replace(record, global_step=step).to_record())
    chain.store.put(keys.record(SAMPLES, 1, "grpo-10"), b"{")
    assert newest_samples(chain, [1]) is None
    found = newest_samples(chain, [1, 0])
    assert found == (0, record)
    history = [{"step": s, "rollout/staleness_mean": 1.0, "rollout/wait_seconds": 0.1} for s in (1, 2)]
    page = stage_markdown("grpo of x", 10, 20, 1.0, history, read_lineage(chain), found)
    assert "![Staleness of samples, mean in versions]" in page
    assert "![Wait for samples in seconds]" in page
    assert "v0 was trained on 8 samples; made by v0 (6), v1 (2); staleness mean 1.25, max 2; ratio mean 1, min" in page
    lines = page.splitlines()
    assert r"| replica\|&lt;b&gt; | 8 | 2 | 4 |" in lines
    assert r"| replica\-1 | 3 | - | - |" in lines
