"""The vLLM of this very server: its engine client, called from a replica's threads."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

from weightline.errors import ApplyError, InputError
from weightline.serving.engines.base import Completion, GenerationRequest
from weightline.serving.engines.vllm.engine import VllmEngine
from weightline.serving.engines.vllm.features import SERVER, require
from weightline.serving.engines.vllm.offline import completion_of, prompts_of, sampling_of

T = TypeVar("T")


class OnlineTransport:
    """Implements `Transport`. Its methods are for threads other than the loop's."""

    def __init__(self, engine_client: Any, loop: asyncio.AbstractEventLoop) -> None:
        require(SERVER)
        self._client, self._loop = engine_client, loop

    def call_workers(self, method: str, *arguments: str) -> Sequence[str]:
        answers: Sequence[str] = self._wait(self._client.collective_rpc(method, args=arguments))
        return answers

    def pause(self) -> None:
        """Of the requests that the barrier let through, those that allow mixing go back into the queue."""
        self._wait(self._client.pause_generation(mode="keep"))

    def resume(self) -> None:
        self._wait(self._client.resume_generation())

    def forget_prefixes(self) -> None:
        if not self._wait(self._client.reset_prefix_cache(reset_running_requests=True, reset_connector=True)):
            raise ApplyError("vLLM did not reset its prefix cache", engine=VllmEngine.name)

    def tell_version(self, version: int | None) -> None:
        tell = getattr(self._client, "update_weight_version", None)
        if tell is not None:
            self._wait(tell("unknown" if version is None else str(version)))

    def generate(self, request: GenerationRequest) -> tuple[tuple[Completion, ...], int]:
        outputs = self._wait(self._generate(request))
        return tuple(completion_of(one) for one in outputs), sum(len(one.prompt_token_ids) for one in outputs)

    async def _generate(self, request: GenerationRequest) -> list[Any]:
        return await asyncio.gather(*(self._last_output(prompt, request) for prompt in prompts_of(request)))

    async def _last_output(self, prompt: Any, request: GenerationRequest) -> Any:
        last = None
        try:
            async for output in self._client.generate(prompt, sampling_of(request), f"weightline-{uuid.uuid4().hex}"):
                last = output
        except ValueError as error:
            raise InputError(f"vLLM refuses the request: {error}", field="prompt") from error
        return last

    def _wait(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()
