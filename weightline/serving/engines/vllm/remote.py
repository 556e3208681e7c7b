"""A vLLM server that somebody else started, over its development routes (VLLM_SERVER_DEV_MODE=1).

Those routes move weights and call workers for whoever reaches them: keep such a server on a loopback address, or behind
something that asks for a token. `weightline serve vllm` needs none of them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import httpx

from weightline.errors import ApplyError, InputError
from weightline.serving.engines.base import Completion, GenerationRequest
from weightline.serving.engines.vllm.engine import VllmEngine

_NOT_FOUND = 404


class RemoteTransport:
    """Implements `Transport`. `token` goes along as a bearer token, where one is given. Close it after use."""

    def __init__(self, url: str, model: str, token: str | None = None, timeout_seconds: float = 600.0) -> None:
        headers = {} if token is None else {"authorization": f"Bearer {token}"}
        self._url, self._model = url.rstrip("/"), model
        self._http = httpx.Client(base_url=self._url, headers=headers, timeout=timeout_seconds, trust_env=False)

    def close(self) -> None:
        """Give the connections back; safe to repeat."""
        self._http.close()

    def call_workers(self, method: str, *arguments: str) -> Sequence[str]:
        answers: Sequence[str] = self._post("/collective_rpc", {"method": method, "args": arguments})["results"]
        return answers

    def pause(self) -> None:
        """vLLM drains: requests from others than this engine end on the old version."""
        self._post("/pause?mode=wait")

    def resume(self) -> None:
        self._post("/resume")

    def forget_prefixes(self) -> None:
        self._post("/reset_prefix_cache")

    def tell_version(self, version: int | None) -> None:
        self._post("/update_weight_version", {"new_version": "unknown" if version is None else str(version)})

    def generate(self, request: GenerationRequest) -> tuple[tuple[Completion, ...], int]:
        body = {
            "model": self._model, "prompt": list(request.prompts), "max_tokens": request.max_tokens,
            "temperature": request.temperature, "top_p": request.top_p, "stop": list(request.stop),
            "seed": request.seed, "return_token_ids": True,
        }  # fmt: skip
        told = self._post("/v1/completions", body)
        choices = sorted(told["choices"], key=lambda choice: choice["index"])
        completions = (
            Completion(one["text"], len(one["token_ids"]), "stop" if one["finish_reason"] == "stop" else "length")
            for one in choices
        )
        return tuple(completions), told["usage"]["prompt_tokens"]

    def _post(self, route: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        try:
            answer = self._http.post(route, json=body)
        except httpx.HTTPError as error:
            raise ApplyError(f"vLLM at {self._url} gives no answer to {route}: {error!r}", url=self._url) from error
        if answer.status_code == _NOT_FOUND:
            raise ApplyError(
                f"vLLM at {self._url} has no {route}: start it with VLLM_SERVER_DEV_MODE=1, on a loopback address",
                url=self._url,
            )
        if answer.is_client_error:
            raise InputError(f"vLLM at {self._url} refuses {route}: {answer.text[:500]}", field="prompt")
        if answer.is_error:
            raise ApplyError(f"vLLM at {self._url} failed at {route}: {answer.text[:500]}", engine=VllmEngine.name)
        told: object = json.loads(answer.content) if answer.content else {}
        return told if isinstance(told, dict) else {}
