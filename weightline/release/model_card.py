"""The model card of a version: where it comes from, in words, and as the Hub's metadata. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import yaml

from weightline.chain.read.records import Record
from weightline.format.manifest import Manifest
from weightline.lineage.table import escape_markdown_url
from weightline.lineage.text import escape_markdown, format_nbytes
from weightline.stages.preflight import is_local_path
from weightline.stages.recipe import ModelConfig

CARD = "README.md"
_MAX_DIGESTS = 200


@dataclass(frozen=True, slots=True)
class CardFacts:
    """What a card is made from. `manifests` are those up to the version, oldest first; the last one is its own."""

    chain_url: str
    chain_name: str
    manifests: Sequence[Manifest]
    evaluations: Sequence[Record]
    start: ModelConfig | None
    license_id: str | None = None

    @property
    def manifest(self) -> Manifest:
        return self.manifests[-1]

    @property
    def base_model(self) -> str | None:
        """The Hub id of the model that training started from, or of the one that an adapter belongs to."""
        if self.manifest.base_model is not None:
            return self.manifest.base_model.name_or_path
        path = self.start.path if self.start is not None else None
        return path if path is not None and not is_local_path(path) else None


def model_card(facts: CardFacts) -> str:
    """Markdown with the Hub's YAML header. Names from the bucket are escaped."""
    header = yaml.safe_dump(_metadata(facts), sort_keys=False, allow_unicode=False)
    return f"---\n{header}---\n" + "\n".join(_body(facts)) + "\n"


def _metadata(facts: CardFacts) -> dict[str, Any]:
    stages = dict.fromkeys(manifest.stage for manifest in facts.manifests)
    metadata: dict[str, Any] = {
        "library_name": "peft" if facts.manifest.base_model is not None else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["weightline", "trl", *(stage for stage in stages if stage in ("sft", "dpo", "grpo"))],
    }
    if facts.license_id is not None:
        metadata["license"] = facts.license_id
    base = facts.base_model
    if base is not None and not is_local_path(base):
        metadata["base_model"] = base
    return metadata


def _body(facts: CardFacts) -> Iterator[str]:
    manifest = facts.manifest
    chain = escape_markdown_url(facts.chain_url)
    yield f"# {escape_markdown(facts.chain_name)} v{manifest.version}"
    yield ""
    yield f"Version {manifest.version} of the chain {chain}, commit `{manifest.commit_id}`."
    yield "Every weight is, bit for bit, what the trainer held when it committed the version."
    yield from _origin(facts)
    yield from (
        "",
        "## Training",
        "",
        "| versions | stage | run | optimizer step | committed (UTC) |",
        "|" + " --- |" * 5,
    )
    yield from (f"| {row} |" for row in _spans(facts.manifests))
    yield from _measured(facts.evaluations)
    yield from _digests(manifest)


def _origin(facts: CardFacts) -> Iterator[str]:
    adapted, fork = facts.manifest.base_model, facts.manifests[0].forked_from
    if adapted is not None:
        yield f"An adapter of {escape_markdown(adapted.name_or_path)}, the model with the digest `{adapted.digest}`."
    elif facts.base_model is not None:
        yield f"Training started from [{escape_markdown(facts.base_model)}](https://huggingface.co/{facts.base_model})."
    elif facts.start is not None:
        started = facts.start.path or facts.start.chain
        where = escape_markdown_url(started) if started else "a small model made from nothing"
        yield f"Training started from {where}."
    if fork is not None:
        yield f"The chain is a fork of version {fork.version} of {escape_markdown_url(fork.chain)}."


def _spans(manifests: Sequence[Manifest]) -> Iterator[str]:
    """One row for versions that follow each other in one stage of one run."""
    for (stage, run_id), group in groupby(manifests, key=lambda m: (m.stage, m.run_id)):
        span = list(group)
        first, last = span[0], span[-1]
        versions = f"v{first.version}" if first is last else f"v{first.version} to v{last.version}"
        cells = (versions, stage, run_id, str(last.global_step), last.created_at)
        yield " | ".join(escape_markdown(cell) for cell in cells)


def _measured(evaluations: Sequence[Record]) -> Iterator[str]:
    yield from ("", "## Evaluation", "")
    done = [record for record in evaluations if record.get("status") == "done"]
    if not done:
        yield "This version was not evaluated."
        return
    yield from ("| task | score | problems |", "| --- | --- | --- |")
    for record in done:
        score = f"{record['score']:.4f}" if isinstance(record.get("score"), int | float) else "-"
        yield f"| {escape_markdown(str(record['name']))} | {score} | {record.get('num_problems', '-')} |"


def _digests(manifest: Manifest) -> Iterator[str]:
    size = f"{manifest.num_elements:,} elements, {format_nbytes(manifest.full_nbytes)}"
    yield from ("", "## Digests", "", f"{len(manifest.tensors)} tensors, {size}.", "")
    yield from ("<details><summary>State digest of every tensor</summary>", "")
    yield from ("| tensor | dtype | shape | digest |", "|" + " --- |" * 4)
    for name, tensor in list(manifest.tensors.items())[:_MAX_DIGESTS]:
        shape = "x".join(str(size) for size in tensor.shape) or "scalar"
        yield f"| {escape_markdown(name)} | {tensor.dtype} | {shape} | `{tensor.digest}` |"
    if len(manifest.tensors) > _MAX_DIGESTS:
        yield f"| and {len(manifest.tensors) - _MAX_DIGESTS} more | | | in the manifest |"
    yield from ("", "</details>")
