"""vLLM in this process: `vllm.LLM` behind the engine interface, for evaluation, tests and batch work."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from weightline.errors import ApplyError, InputError
from weightline.serving.engines.barrier import RequestBarrier
from weightline.serving.engines.base import Completion, GenerationRequest
from weightline.serving.engines.vllm.engine import VllmEngine
from weightline.serving.engines.vllm.features import OFFLINE, require

WORKER_EXTENSION = "weightline.serving.engines.vllm.worker.WeightlineWorker"


class OfflineTransport:
    """Implements `Transport`. `LLM` is not safe in threads: the engine's barrier lets one request in at a time."""

    def __init__(self, llm: Any) -> None:
        self._llm = llm

    def call_workers(self, method: str, *arguments: str) -> Sequence[str]:
        answers: Sequence[str] = self._llm.collective_rpc(method, args=arguments)
        return answers

    def pause(self) -> None:
        """Nothing runs: the barrier is closed and `LLM` computes only while it is asked to."""

    def resume(self) -> None:
        """Nothing was stopped."""

    def forget_prefixes(self) -> None:
        if not self._llm.reset_prefix_cache():
            raise ApplyError("vLLM did not reset its prefix cache", engine=VllmEngine.name)

    def tell_version(self, version: int | None) -> None:
        """`LLM` has no place for it; answers of the engine carry it."""

    def generate(self, request: GenerationRequest) -> tuple[tuple[Completion, ...], int]:
        try:
            outputs = self._llm.generate(prompts_of(request), sampling_of(request), use_tqdm=False)
        except ValueError as error:
            raise InputError(f"vLLM refuses the request: {error}", field="prompt") from error
        return tuple(completion_of(one) for one in outputs), sum(len(one.prompt_token_ids) for one in outputs)


def prompts_of(request: GenerationRequest) -> list[Any]:
    """The prompts as vLLM takes them."""
    return [prompt if isinstance(prompt, str) else {"prompt_token_ids": list(prompt)} for prompt in request.prompts]


def sampling_of(request: GenerationRequest) -> Any:
    """vLLM's SamplingParams of a request."""
    from vllm import SamplingParams

    return SamplingParams(
        max_tokens=request.max_tokens,
        temperature=request.temperature,
        top_p=request.top_p,
        stop=list(request.stop) or None,
        seed=request.seed,
    )


def completion_of(output: Any) -> Completion:
    """The completion of one of vLLM's RequestOutputs."""
    told = output.outputs[0]
    return Completion(told.text, len(told.token_ids), "stop" if told.finish_reason == "stop" else "length")


def start_offline(model_folder: Path, **options: Any) -> tuple[VllmEngine, Any]:
    """(engine, its `LLM`) for a folder with a config and a tokenizer; no weights are read until a version is loaded.

    `options` go to `vllm.LLM`. UnsupportedFeatureError when this vLLM lacks what the engine needs.
    """
    require(OFFLINE)
    from vllm import LLM

    llm = LLM(str(model_folder), load_format="dummy", worker_extension_cls=WORKER_EXTENSION, **options)
    return VllmEngine(OfflineTransport(llm), RequestBarrier(max_in_flight=1), model_folder), llm
