"""Samples: their parts belong together, and JSON gives back the same bits."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightline.errors import InputError
from weightline.rollouts.sample import Sample, Span, as_float32, joined
from weightline.rollouts.sampling import Sampling, seed_of

LOGPROBS = st.floats(-200, 0, width=32)


@st.composite
def samples(draw: st.DrawFn) -> Sample:
    mask = draw(st.lists(st.booleans(), max_size=20))
    spans, left = [], sum(mask)
    while left:
        spans.append(Span(draw(st.integers(0, 5)), draw(st.integers(1, left))))
        left -= spans[-1].num_tokens
    ids = st.integers(0, 2**31 - 1)
    return Sample(
        prompt_ids=tuple(draw(st.lists(ids, max_size=5))),
        token_ids=tuple(draw(st.lists(ids, min_size=len(mask), max_size=len(mask)))),
        logprobs=tuple(draw(LOGPROBS) if one else 0.0 for one in mask),
        spans=tuple(spans),
        mask=None if all(mask) and draw(st.booleans()) else tuple(mask),
        finish_reason=draw(st.sampled_from([None, "stop", "length"])),
        replica=draw(st.sampled_from(["", "r1"])),
        fields=draw(st.dictionaries(st.text(max_size=3), st.integers() | st.text(max_size=3), max_size=2)),
    )


@given(samples())
def test_json_gives_back_the_sample(sample: Sample) -> None:
    assert Sample.from_json(json.loads(json.dumps(sample.to_json()))) == sample
    bare = json.loads(json.dumps(sample.to_json(with_prompt=False)))
    assert "prompt_ids" not in bare
    assert Sample.from_json(bare, sample.prompt_ids) == sample


def test_json_takes_about_twenty_bytes_a_token() -> None:
    drawn = np.random.default_rng(0)
    logprobs = as_float32((-drawn.exponential(2.0, 1000)).tolist())
    sample = Sample((1, 2), tuple(drawn.integers(0, 150_000, 1000).tolist()), logprobs, (Span(7, 1000),))
    assert 15_000 < len(json.dumps(sample.to_json())) < 22_000


GOOD = {"prompt_ids": [1], "token_ids": [5, 6], "logprobs": [-1.0, -0.5], "spans": [[3, 2]]}


@pytest.mark.parametrize(
    "wrong",
    [
        {"token_ids": [5]},
        {"token_ids": [5, True]},
        {"token_ids": [5, 6.0]},
        {"token_ids": [5, -1]},
        {"token_ids": [5, "6"]},
        {"token_ids": [5, 2**31]},
        {"prompt_ids": [None]},
        {"logprobs": [-1.0]},
        {"logprobs": [-1.0, float("nan")]},
        {"logprobs": [-1.0, -1e300]},
        {"logprobs": [-1.0, None]},
        {"logprobs": [-1.0, "x"]},
        {"spans": [[3, 1]]},
        {"spans": [[3, 3], [4, -1]]},
        {"spans": [[3, 2], [4, 0]]},
        {"spans": [[-1, 2]]},
        {"spans": [[3]]},
        {"mask": [1]},
        {"mask": [1, 0]},
        {"spans": None},
    ],
)
def test_parts_that_do_not_belong_together_are_refused(wrong: dict[str, Any]) -> None:
    assert Sample.from_json(GOOD).num_written == 2
    with pytest.raises(InputError):
        Sample.from_json(GOOD | wrong)


def test_tokens_that_the_model_did_not_write_have_no_span() -> None:
    sample = Sample((1,), (5, 6, 7), (-1.0, 0.0, -2.0), (Span(3, 1), Span(4, 1)), (True, False, True))
    assert (sample.num_written, sample.versions, sample.is_mixed) == (2, {3, 4}, True)


def test_neighbouring_spans_of_one_version_are_one() -> None:
    assert joined([Span(3, 2), Span(3, 1), Span(4, 0), Span(4, 2), Span(3, 1)]) == (Span(3, 3), Span(4, 2), Span(3, 1))


@pytest.mark.parametrize(
    ("field", "value"),
    [("n", 0), ("max_tokens", 0), ("temperature", -1.0), ("temperature", float("nan")), ("top_p", 0.0), ("top_p", 1.5),
     ("top_k", -1), ("min_p", 2.0), ("repetition_penalty", 0.0)],
)  # fmt: skip
def test_sampling_names_the_field_that_is_wrong(field: str, value: float) -> None:
    arguments: dict[str, Any] = {field: value}
    with pytest.raises(InputError) as caught:
        Sampling(**arguments)
    assert caught.value.field == field


def test_logprobs_of_the_model_itself_need_no_processing() -> None:
    assert not Sampling(8, 100, stop_token_ids=(3,)).needs_processed_logprobs
    assert Sampling(temperature=0.7).needs_processed_logprobs
    assert Sampling(top_k=20).needs_processed_logprobs


def test_seeds_depend_on_every_part() -> None:
    seeds = {seed_of(*parts) for parts in [(1, 2, 3), (1, 2, 4), (1, 23), (12, 3), (1, 2, 3, 0)]}
    assert len(seeds) == 5
    assert all(0 <= seed < 2**63 for seed in seeds)
