"""Samples for a trainer from the embedded server: tokens, logprobs, ends and seeds, against the pulled weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.serving.http.test_app import AppClient
from tests.serving.model_chains import ModelChain, make_chain
from weightline.chain.files.checkpoint import write_checkpoint
from weightline.serving.http.service import ReplicaService
from weightline.serving.replica.replica import Replica

PROMPTS = [list(b"12+34="), list(b"7+8="), list(b"a longer prompt: ")]
END = 256


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> ModelChain:
    """Three versions in float32, so that logprobs of the same weights agree closely."""
    return make_chain((tmp_path_factory.mktemp("chain") / "toy").as_uri(), num_versions=3, dtype=torch.float32)


@pytest.fixture
def client(replica: Replica) -> AppClient:
    return AppClient(ReplicaService(replica))


def _roll(client: AppClient, **body: Any) -> Any:
    sampling = {"prompts": PROMPTS, "n": 4, "max_tokens": 12, "temperature": 0.7, "top_p": 0.9, "seed": 5}
    answer = client.ask("POST", "/weightline/rollouts", sampling | body)
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-weightline-version"] == str(answer.json()["version"])
    return answer.json()


class Reference:
    """The logprobs of tokens by a forward pass in float32 on the pulled checkpoint of a version."""

    def __init__(self, grown: ModelChain, version: int, folder: Path) -> None:
        write_checkpoint(grown.chain, version, folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.inference_mode()
    def logprobs(self, prompt: list[int], tokens: list[int], temperature: float, top_p: float) -> list[float]:
        logits = self.model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        found = []
        for scores, token in zip(logits / (temperature or 1.0), tokens, strict=True):
            probs = scores.softmax(-1)
            order = probs.argsort(descending=True).tolist()
            kept, total = [], 0.0
            for one in order:
                if total >= top_p:
                    break
                kept.append(one)
                total += probs[one].item()
            assert token in kept
            found.append((scores[token] - scores[kept].logsumexp(0)).item())
        return found


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.9), (0.0, 1.0)])
def test_logprobs_are_those_of_the_versions_weights_and_of_no_others(
    client: AppClient, replica: Replica, grown: ModelChain, tmp_path: Path, temperature: float, top_p: float
) -> None:
    replica.refresh(2)
    told = _roll(client, temperature=temperature, top_p=top_p)
    assert told["version"] == 2
    right, wrong = (Reference(grown, version, tmp_path / f"v{version}") for version in (2, 1))
    furthest = 0.0
    for prompt, group in zip(PROMPTS, told["samples"], strict=True):
        assert len(group) == 4
        for sample in group:
            tokens, logprobs = sample["token_ids"], sample["logprobs"]
            expected = right.logprobs(prompt, tokens, temperature, top_p)
            assert logprobs == pytest.approx(expected, abs=1e-4)
            if top_p == 1:
                other = wrong.logprobs(prompt, tokens, temperature, top_p)
                furthest = max(furthest, max(abs(a - b) for a, b in zip(logprobs, other, strict=True)))
    assert top_p < 1 or furthest > 1e-2


def test_a_seed_gives_a_prompt_the_same_samples_whatever_else_is_asked(
    client: AppClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = _roll(client)["samples"]

    def tokens(groups: Any) -> list[list[list[int]]]:
        return [[sample["token_ids"] for sample in group] for group in groups]

    assert _roll(client)["samples"] == first
    assert tokens(_roll(client, seed=[5, 6, 7])["samples"]) == tokens(first)
    assert tokens(_roll(client, prompts=PROMPTS[1:2], seed=6, n=2)["samples"]) == [tokens(first)[1][:2]]
    # As many batches as samples: the batches that bound the memory make no difference.
    monkeypatch.setattr("weightline.serving.engines.transformers._MAX_ROWS", 1)
    assert tokens(_roll(client)["samples"]) == tokens(first)
    assert tokens(_roll(client, seed=8)["samples"]) != tokens(first)
    assert tokens(_roll(client, seed=None)["samples"]) != tokens(_roll(client, seed=None)["samples"])
    assert len({tuple(sample["token_ids"]) for sample in first[0]}) > 1


def test_the_end_token_belongs_to_a_sample_and_the_padding_does_not(client: AppClient) -> None:
    ended, cut = [], []
    for sample in (one for group in _roll(client, temperature=5.0, top_p=1.0, n=128)["samples"] for one in group):
        assert len(sample["token_ids"]) == len(sample["logprobs"]) <= 12
        (ended if sample["finish_reason"] == "stop" else cut).append(sample["token_ids"])
    assert ended
    assert all(tokens.index(END) == len(tokens) - 1 for tokens in ended)
    assert all(len(tokens) == 12 and END not in tokens for tokens in cut)


def test_completions_have_samples_logprobs_and_token_ids(client: AppClient) -> None:
    rolled = _roll(client, prompts=PROMPTS[:2], n=3)["samples"]
    told = client.complete(
        prompt=PROMPTS[:2], n=3, max_tokens=12, temperature=0.7, top_p=0.9, seed=5, logprobs=2, return_token_ids=True
    ).json()
    assert [choice["index"] for choice in told["choices"]] == list(range(6))
    for choice, sample in zip(told["choices"], rolled[0] + rolled[1], strict=True):
        assert choice["token_ids"] == sample["token_ids"]
        assert choice["prompt_token_ids"] == PROMPTS[choice["index"] // 3]
        logprobs = choice["logprobs"]
        assert logprobs["token_logprobs"] == pytest.approx(sample["logprobs"], abs=1e-6)
        assert {len(top) for top in logprobs["top_logprobs"]} <= {1, 2, 3}
        for token, value, top in zip(
            logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True
        ):
            assert top[token] == value
    assert told["usage"]["completion_tokens"] == sum(len(choice["token_ids"]) for choice in told["choices"])


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"prompts": []}, "prompts"), ({"prompts": [[]]}, "prompt"), ({"prompts": [[999]]}, "prompt"),
        ({"prompts": ["text"]}, "prompts"), ({"n": 0}, "n"), ({"n": 256, "prompts": [[1]] * 17}, "n"),
        ({"max_tokens": 999}, "max_tokens"), ({"max_tokens": None}, "max_tokens"), ({"seed": [1]}, "seed"),
        ({"seed": -1}, "seed"), ({"logprobs": 0}, "logprobs"),
    ],
)  # fmt: skip
def test_rollouts_that_cannot_be_given_are_refused_by_field(
    client: AppClient, body: dict[str, Any], field: str
) -> None:
    answer = client.ask("POST", "/weightline/rollouts", {"prompts": PROMPTS, "max_tokens": 4} | body)
    assert (answer.status_code, answer.json()["error"]["facts"]) == (400, {"field": field})
