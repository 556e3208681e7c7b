"""A running vLLM says what transformers says, on every version that it is moved to and back to."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.vllm.parts import checksums, fresh, greedy_tokens, make_chain, offline, reference_tokens
from weightline.serving.replica.replica import Replica, prove_weights


@pytest.mark.parametrize("tensor_parallel_size", [1, 2])
@pytest.mark.parametrize("kind", ["qwen3", "qwen2-tied", "llama"])
def test_tokens_and_checksums_are_those_of_a_fresh_load_forth_and_back(
    kind: str, tensor_parallel_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if tensor_parallel_size == 2:
        first, *others = sorted(os.sched_getaffinity(0))
        monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", f"{first}|{others[0] if others else first}")
    made = make_chain(tmp_path, kind, num_versions=4)
    expected = [reference_tokens(folder) for folder in made.folders]
    assert len({tuple(tokens) for tokens in expected}) == len(expected), "tokens must tell versions apart"
    with fresh(made, 2, tensor_parallel_size) as llm:
        assert greedy_tokens(llm) == expected[2]
        fresh_checksums = checksums(llm)
    with offline(made, tensor_parallel_size) as (engine, llm):
        replica = Replica(made.chain, engine, tmp_path / "state", "replica-0")
        replica.refresh(0)
        assert greedy_tokens(llm) == expected[0]
        before = checksums(llm)
        assert replica.refresh(2).num_changed < made.chain.manifest(2).num_elements / 10
        assert greedy_tokens(llm) == expected[2]
        assert checksums(llm) == fresh_checksums != before
        replica.refresh(3)
        assert greedy_tokens(llm) == expected[3]
        prove_weights(engine, made.chain, 3)
        replica.refresh(0, allow_backward=True)
        assert greedy_tokens(llm) == expected[0]
        assert checksums(llm) == before
