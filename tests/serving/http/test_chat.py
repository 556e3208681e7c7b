"""Chat completions: the version's own template makes the prompt, and the answer has OpenAI's shape."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.serving.http.test_app import AppClient
from tests.serving.model_chains import make_chain
from weightline.errors import InputError
from weightline.serving.engines.base import Conversation, GenerationRequest
from weightline.serving.engines.transformers import TransformersEngine
from weightline.serving.engines.vllm.driver import prompts_of
from weightline.serving.http.service import ReplicaService
from weightline.serving.replica.replica import Replica

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "[{{ m.role }}]{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
HELLO = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "12+34="}]


@pytest.fixture
def replica(tmp_path: Path) -> Replica:
    """A replica of a chain whose versions have a chat template, at version 0."""
    grown = make_chain(f"memory://{uuid.uuid4().hex}/toy", num_versions=2, chat_template=TEMPLATE)
    made = Replica(grown.chain, TransformersEngine("cpu"), tmp_path / "state", "replica-0")
    made.refresh(0)
    return made


@pytest.fixture
def client(replica: Replica) -> AppClient:
    return AppClient(ReplicaService(replica))


def _chat(client: AppClient, **body: Any) -> httpx.Response:
    asked = {"messages": HELLO, "temperature": 0, "max_tokens": 8} | body
    return client.ask("POST", "/v1/chat/completions", {name: value for name, value in asked.items() if value != ...})


def test_a_chat_is_the_completion_of_what_the_template_writes(client: AppClient, replica: Replica) -> None:
    prompt = "[system]Be brief.\n[user]12+34=\n[assistant]"
    for version in (0, 1):
        replica.refresh(version)
        answer = _chat(client)
        expected = client.complete(prompt=prompt).json()
        assert (answer.status_code, answer.headers["x-weightline-version"]) == (200, str(version))
        told = answer.json()
        (choice,) = told.pop("choices")
        assert choice == {
            "index": 0, "finish_reason": "length", "logprobs": None,
            "message": {"role": "assistant", "content": expected["choices"][0]["text"]},
        }  # fmt: skip
        assert told.pop("id").startswith("chatcmpl-")
        assert isinstance(told.pop("created"), int)
        assert told == {
            "object": "chat.completion", "model": "toy", "weightline_version": version, "usage": expected["usage"],
        }  # fmt: skip


def test_content_may_come_in_parts_of_text(client: AppClient) -> None:
    parts = [{"type": "text", "text": "12+"}, {"type": "text", "text": "34="}]
    whole, split = (_chat(client, messages=[{"role": "user", "content": c}]).json() for c in ("12+34=", parts))
    assert whole["choices"] == split["choices"]
    assert whole["usage"] == split["usage"]


def test_without_a_limit_the_answer_ends_with_the_models_positions(client: AppClient) -> None:
    usage = _chat(client, max_tokens=...).json()["usage"]
    assert usage["total_tokens"] <= 128
    limited = _chat(client, max_tokens=..., max_completion_tokens=3).json()["usage"]
    assert limited["completion_tokens"] <= 3
    assert _chat(client, max_tokens=3, max_completion_tokens=3).status_code == 200


@pytest.mark.parametrize(
    ("body", "field", "says"),
    [
        ({"stream": True}, "stream", "streaming is not supported"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages", "user"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "text": "x"}]}]}, "messages", "text"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages", "no tools here"),
        ({"messages": [{"role": "user", "content": "x" * 200}]}, "max_tokens", "128 positions"),
        ({"max_completion_tokens": 9}, "max_tokens", "different limits"),
        ({"tools": []}, "tools", "does not support"),
        ({"prompt": "x"}, "prompt", "does not support"),
    ],
)  # fmt: skip
def test_a_chat_that_cannot_be_given_is_refused_by_field(
    client: AppClient, body: dict[str, Any], field: str, says: str
) -> None:
    answer = _chat(client, **body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["facts"] == {"field": field}
    assert says in error["message"]


def test_half_a_surrogate_pair_is_refused(client: AppClient) -> None:
    body = rb'{"messages": [{"role": "user", "content": "a\ud800"}]}'
    assert client.ask("POST", "/v1/chat/completions", body).json()["error"]["facts"] == {"field": "messages"}


def test_a_version_without_a_template_says_so(tmp_path: Path) -> None:
    grown = make_chain(f"memory://{uuid.uuid4().hex}/toy")
    replica = Replica(grown.chain, TransformersEngine("cpu"), tmp_path / "state", "replica-0")
    replica.refresh(0)
    error = _chat(AppClient(ReplicaService(replica))).json()["error"]
    assert error["message"] == "version 0 has no chat template: ask /v1/completions with a prompt"


def test_vllm_answers_chats_itself() -> None:
    with pytest.raises(InputError, match="/v1/chat/completions"):
        prompts_of(GenerationRequest((Conversation(({"role": "user", "content": "x"},)),), max_tokens=1))
