"""The model card of a version: its origin as text, and as metadata of the Hub.

The text is in model_card_template.md. `ModelCard` of huggingface_hub fills it in, by jinja2, and writes the YAML
header.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from weightline.chain import Chain
from weightline.chain.read.records import EVALUATIONS, Record, read_version_records
from weightline.evaluation.gate import measured_score
from weightline.format.manifest import Header, Manifest
from weightline.lineage.text import escape_markdown, escape_markdown_url, format_nbytes
from weightline.stages.preflight import is_local_path
from weightline.stages.recipe import ModelConfig

CARD = "README.md"
_TEMPLATE = Path(__file__).with_name("model_card_template.md")
_MAX_DIGESTS = 200


@dataclass(frozen=True, slots=True)
class Span:
    """Versions that follow each other in one stage of one run. Step and time are those of the last one."""

    versions: str
    stage: str
    run_id: str
    global_step: int
    created_at: str


@dataclass(frozen=True, slots=True)
class Score:
    """The result of one finished evaluation of the version."""

    task: str
    score: float | None
    num_problems: int | None


@dataclass(frozen=True, slots=True)
class CardFacts:
    """The facts of a card. `headers` are those up to the version, oldest first; `manifest` is the version's own."""

    chain_url: str
    chain_name: str
    headers: Sequence[Header]
    manifest: Manifest
    scores: Sequence[Score]
    start: ModelConfig | None
    """The model that training started from, if the run's recipe is recorded."""
    license_id: str | None = None

    @property
    def base_model(self) -> str | None:
        """Returns the Hub id of the model that training started from, or of an adapter's base model; else None."""
        if self.manifest.base_model is not None:
            path: str | None = self.manifest.base_model.name_or_path
        else:
            path = self.start.path if self.start is not None else None
        return path if path is not None and not is_local_path(path) else None

    @property
    def spans(self) -> tuple[Span, ...]:
        return tuple(_spans(self.headers))


def card_facts(chain: Chain, version: int, start: ModelConfig | None, license_id: str | None = None) -> CardFacts:
    """Reads the facts of a card: every header up to the version, its own manifest, and its evaluations."""
    records = read_version_records(chain, EVALUATIONS, version)
    scores = tuple(_score(record) for record in records if record.get("status") == "done")
    headers = tuple(chain.headers(last=version))
    return CardFacts(chain.url, chain.name, headers, chain.manifest(version), scores, start, license_id)


def model_card(facts: CardFacts) -> str:
    """Returns the card as Markdown with the Hub's YAML header. Names from the bucket are escaped. Pure."""
    from huggingface_hub import ModelCard, ModelCardData

    manifest = facts.manifest
    stages = dict.fromkeys(one.stage for one in facts.headers)
    metadata = ModelCardData(
        library_name="peft" if manifest.base_model is not None else "transformers",
        pipeline_tag="text-generation",
        tags=["weightline", "trl", *(stage for stage in stages if stage in ("sft", "dpo", "grpo"))],
        license=facts.license_id,
        base_model=facts.base_model,
    )
    card = ModelCard.from_template(
        metadata,
        template_path=str(_TEMPLATE),
        facts=facts,
        manifest=manifest,
        adapted=manifest.base_model,
        start=facts.start,
        fork=facts.headers[0].forked_from,
        tensors=list(manifest.tensors.items())[:_MAX_DIGESTS],
        num_more=max(0, len(manifest.tensors) - _MAX_DIGESTS),
        text=escape_markdown,
        url=escape_markdown_url,
        nbytes=format_nbytes,
    )
    return f"{card}\n"


def card_body(card: str) -> str:
    """Returns the card without its YAML header. Pure."""
    from huggingface_hub import ModelCard

    return str(ModelCard(card).text)


def _spans(headers: Sequence[Header]) -> Iterator[Span]:
    for (stage, run_id), group in groupby(headers, key=lambda m: (m.stage, m.run_id)):
        span = list(group)
        first, last = span[0], span[-1]
        versions = f"v{first.version}" if first is last else f"v{first.version} to v{last.version}"
        yield Span(versions, stage, run_id, last.global_step, last.created_at)


def _score(record: Record) -> Score:
    num_problems = record.get("num_problems")
    return Score(record["name"], measured_score(record), num_problems if isinstance(num_problems, int) else None)
