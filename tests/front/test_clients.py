"""Clients that others wrote, before a front and before a replica: OpenAI's, lm-evaluation-harness's and TRL's."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import httpx
import openai
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI
from trl.generation import vllm_client
from trl.generation.vllm_client import VLLMClient

from tests.front.fronts import running_front
from tests.serving.model_chains import make_chain
from tests.serving.servers import running_replica

TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
PROMPTS = [[72, 101, 108, 108, 111], [87, 111, 114, 108, 100, 33]]


@pytest.fixture(scope="module", params=["replica", "front"])
def url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A replica that serves version 1, or a front before two of them."""
    folder = tmp_path_factory.mktemp(request.param)
    chain = make_chain(f"memory://{uuid.uuid4().hex}/toy", num_versions=2, chat_template=TEMPLATE).chain
    names = ["a"] if request.param == "replica" else ["a", "b"]
    with ExitStack() as running:
        made = [running.enter_context(running_replica(chain, folder / name, name, version=1)) for name in names]
        if request.param == "replica":
            yield made[0].url
        else:
            yield running.enter_context(running_front(chain.url, folder / "front", num_up=2))


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0, timeout=120) as made:
        yield made


def test_openai_completions(client: openai.OpenAI) -> None:
    (model,) = client.models.list()
    request: dict[str, Any] = {"model": model.id, "prompt": ["one", "two"], "n": 2, "max_tokens": 4, "seed": 7}
    raw = client.completions.with_raw_response.create(**request, logprobs=1)
    assert raw.headers["x-weightline-version"] == "1"
    answer = raw.parse()
    assert len(answer.choices) == 4
    assert all(len(choice.logprobs.token_logprobs) == len(choice.logprobs.tokens) for choice in answer.choices)
    again = client.completions.create(**request)
    assert [choice.text for choice in again.choices] == [choice.text for choice in answer.choices]


def test_openai_chats(client: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "hello"}]
    answer = client.chat.completions.create(model="toy", messages=messages, max_tokens=4, temperature=0)
    assert answer.choices[0].message.role == "assistant"
    assert 1 <= answer.usage.completion_tokens <= 4


def test_openai_versions_and_errors(client: openai.OpenAI) -> None:
    ask = client.completions.create
    held = ask(model="toy", prompt="one", max_tokens=2, extra_headers={"x-weightline-min-version": "1"})
    assert held.model == "toy"
    for header in ("x-weightline-min-version", "x-weightline-version"):
        with pytest.raises(openai.ConflictError) as behind:
            ask(model="toy", prompt="one", extra_headers={header: "2"})
        assert behind.value.code == "version-not-served"
        assert behind.value.response.headers["x-weightline-version"] == "1"
    with pytest.raises(openai.NotFoundError, match="this replica serves 'toy'"):
        ask(model="another", prompt="one")
    with pytest.raises(openai.BadRequestError, match="suffix"):
        ask(model="toy", prompt="one", suffix="end")


@pytest.mark.parametrize("num_concurrent", [1, 3])
def test_lm_evaluation_harness_generates(url: str, num_concurrent: int) -> None:
    model = LocalCompletionsAPI(
        model="toy", base_url=f"{url}/v1/completions", tokenizer_backend=None, tokenized_requests=False,
        num_concurrent=num_concurrent, batch_size=2, max_retries=1,
    )  # fmt: skip
    contexts = [f"question {number}" for number in range(5)]
    arguments = {"until": ["\n"], "max_gen_toks": 4, "temperature": 0}
    requests = [
        Instance("generate_until", {}, (context, dict(arguments)), number) for number, context in enumerate(contexts)
    ]
    texts = model.generate_until(requests, disable_tqdm=True)
    body = {"prompt": contexts, "max_tokens": 4, "temperature": 0, "stop": ["\n"]}
    direct = httpx.post(f"{url}/v1/completions", json=body, trust_env=False, timeout=120).json()
    assert texts == [choice["text"] for choice in direct["choices"]]


@pytest.fixture
def trl(url: str, monkeypatch: pytest.MonkeyPatch) -> VLLMClient:
    """TRL's client of vllm_mode="server". It wants vLLM beside itself, for pushing weights alone."""
    monkeypatch.setattr(vllm_client, "is_vllm_available", lambda *_, **__: True)
    return VLLMClient(base_url=url)


def test_trl_generates(url: str, trl: VLLMClient) -> None:
    made = trl.generate(PROMPTS, n=2, max_tokens=4, temperature=0.7, generation_kwargs={"seed": 7})
    assert made["prompt_ids"] == PROMPTS
    assert len(made["completion_ids"]) == 4
    assert made["logprob_token_ids"] == [[[token] for token in ids] for ids in made["completion_ids"]]
    body = {"prompts": PROMPTS, "n": 2, "max_tokens": 4, "temperature": 0.7, "seed": 7}
    direct = httpx.post(f"{url}/weightline/rollouts", json=body, trust_env=False, timeout=120).json()
    samples = [sample for group in direct["samples"] for sample in group]
    assert made["completion_ids"] == [sample["token_ids"] for sample in samples]
    assert made["logprobs"] == [[[logprob] for logprob in sample["logprobs"]] for sample in samples]


def test_trl_chats(trl: VLLMClient) -> None:
    made = trl.chat([[{"role": "user", "content": "Hello"}]] * 3, n=2, max_tokens=4)
    assert made["prompt_ids"] == [PROMPTS[0]] * 3
    assert len(made["completion_ids"]) == 6
    assert made["logprob_token_ids"] == [[[token] for token in ids] for ids in made["completion_ids"]]


def test_trl_is_refused_when_it_would_push_weights(trl: VLLMClient) -> None:
    with pytest.raises(Exception, match=r"501.*weights cannot be pushed here.*from its chain"):
        trl.init_communicator(device="cpu")
    with pytest.raises(Exception, match="501"):
        trl.reset_prefix_cache()
    with pytest.raises(Exception, match="501"):
        trl.update_named_param("lm_head.weight", torch.zeros(1))
