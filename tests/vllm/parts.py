"""Tiny float32 models, chains of them, a vLLM that serves them, and what transformers says of them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from weightline.chain import Chain, open_chain
from weightline.chain.files.checkpoint import write_checkpoint
from weightline.chain.files.source import FolderSource
from weightline.chain.write.standalone import commit_folder
from weightline.serving.engines.base import GenerationRequest
from weightline.serving.engines.vllm.driver import WORKER_EXTENSION, VllmEngine, start_offline
from weightline.serving.engines.vllm.serve import fetch_model_folder
from weightline.stages.model import VOCAB_SIZE, build_byte_tokenizer

MAX_TOKENS = 16
#: The last one is longer than a block of vLLM's prefix cache, so that a stale cache shows.
PROMPTS = ("12+34=", "a", "def main(argv):", "one prompt that is asked again and again " * 3)

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": None,
    "eos_token_id": 256, "pad_token_id": 257, "initializer_range": 0.3, "dtype": "float32",
}  # fmt: skip
CONFIGS: dict[str, Any] = {
    "qwen3": Qwen3Config(**_SIZES, head_dim=32, tie_word_embeddings=False),
    "qwen2-tied": Qwen2Config(**_SIZES, tie_word_embeddings=True),
    "llama": LlamaConfig(**_SIZES, tie_word_embeddings=False),
}


@dataclass
class FolderChain:
    """A chain that was committed from checkpoint folders, which are kept: `folders[v]` holds version v."""

    chain: Chain
    work: Path
    folders: list[Path] = field(default_factory=list)

    def grow(self, density: float = 0.02) -> int:
        """Commit the next version: the last one with a few elements of every tensor drawn anew."""
        version = len(self.folders)
        folder = self.work / f"v{version}"
        shutil.copytree(self.folders[-1], folder)
        rng = np.random.default_rng(version)
        for entry in FolderSource(folder)._entries.values():
            values_N = np.memmap(entry.path, "<f4", "r+", entry.offset, entry.spec.num_elements)
            at = rng.choice(values_N.size, max(1, int(values_N.size * density)), replace=False)
            values_N[at] = rng.normal(1.0 if "norm" in entry.spec.name else 0.0, 0.3, at.size)
            values_N.flush()
        self.folders.append(folder)
        assert commit_folder(self.chain, folder).version == version
        return version


def make_chain(work: Path, kind: str, num_versions: int) -> FolderChain:
    """Random weights, large enough that versions answer differently; biases and norms random too."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind]).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    first = work / "v0"
    model.save_pretrained(first)
    build_byte_tokenizer(256).save_pretrained(first)
    made = FolderChain(open_chain((work / "bucket").as_uri()), work, [first])
    commit_folder(made.chain, first)
    for _ in range(num_versions - 1):
        made.grow()
    return made


def reference_tokens(folder: Path, prompts: Sequence[str] = PROMPTS) -> list[tuple[int, ...]]:
    """The greedy tokens of transformers on a checkpoint folder, each prompt by itself."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    for prompt in prompts:
        ids = torch.tensor([list(prompt.encode())])
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=MAX_TOKENS, min_new_tokens=MAX_TOKENS,
            do_sample=False, pad_token_id=257,
        )  # fmt: skip
        found.append(tuple(output[0, ids.shape[1] :].tolist()))
    return found


@contextmanager
def offline(made: FolderChain, tensor_parallel_size: int = 1, **options: Any) -> Iterator[tuple[VllmEngine, Any]]:
    """A vLLM in other processes, without weights, and its engine."""
    folder = fetch_model_folder(made.chain, 0, made.work / "model", fallback=made.work)
    engine, llm = start_offline(folder, **_OPTIONS, tensor_parallel_size=tensor_parallel_size, **options)
    try:
        yield engine, llm
    finally:
        engine.close()
        llm.llm_engine.engine_core.shutdown()


@contextmanager
def fresh(made: FolderChain, version: int, tensor_parallel_size: int = 1) -> Iterator[Any]:
    """A vLLM that loaded the pulled checkpoint of a version as it loads any other."""
    from vllm import LLM

    folder = made.work / f"pulled-{version}-{tensor_parallel_size}"
    write_checkpoint(made.chain, version, folder)
    options = _OPTIONS | {"worker_extension_cls": WORKER_EXTENSION, "tensor_parallel_size": tensor_parallel_size}
    llm = LLM(str(folder), **options)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()


_OPTIONS: dict[str, Any] = {
    "dtype": "float32", "enforce_eager": True, "max_model_len": 256, "max_num_seqs": 8,
    "kv_cache_memory_bytes": 2**26,
}  # fmt: skip


def greedy_tokens(llm: Any, prompts: Sequence[str] = PROMPTS) -> list[tuple[int, ...]]:
    """The greedy tokens of a running vLLM."""
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=MAX_TOKENS, min_tokens=MAX_TOKENS, temperature=0, ignore_eos=True)
    asked = [{"prompt_token_ids": list(prompt.encode())} for prompt in prompts]
    outputs = llm.generate(asked, sampling, use_tqdm=False)
    return [tuple(one.outputs[0].token_ids) for one in outputs]


def checksums(llm: Any) -> list[dict[str, str]]:
    """vLLM's own checksums of all weights, by worker."""
    return llm.collective_rpc("compute_weight_checksums")


def ask(prompt: str = PROMPTS[0]) -> GenerationRequest:
    return GenerationRequest((prompt,), max_tokens=MAX_TOKENS)
