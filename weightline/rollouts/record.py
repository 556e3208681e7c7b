"""The record of the samples that a version was trained on: which versions and replicas made them, and some as text.

Training writes one for each optimizer step, under the kind `samples`, beside the version that the step becomes.
Readers parse it, whatever a bucket holds under its key, into an object of bounded size.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from weightline.chain.read.records import Record
from weightline.rollouts.sample import Span

#: Groups that a record keeps: the last ones of the step.
MAX_GROUPS = 4
#: Completions that a record keeps of a group: the first ones.
MAX_COMPLETIONS = 16
MAX_TEXT_LENGTH = 2_000
MAX_NBYTES = 64 * 1024
_MAX_ENTRIES = 64
_MAX_NAME_LENGTH = 128
_MAX_INTEGER = 2**53
#: Room for what `write_record` adds: kind, version, name, time.
_STAMP_NBYTES = 512
_CUT = " [...] "
_VERSION = re.compile(r"[0-9]{1,15}")
_NUMBERS = ("wait_seconds", "generate_seconds", "num_regenerated", "num_mixed", "queue_length")


@dataclass(frozen=True, slots=True)
class Spread:
    """Mean, smallest and largest of some numbers. None for one that is unknown."""

    mean: float | None = None
    min: float | None = None
    max: float | None = None


@dataclass(frozen=True, slots=True)
class ReplicaWork:
    """The samples that one replica generated, and the seconds in which it was busy with them."""

    num_samples: int
    seconds: float | None = None

    @property
    def samples_per_second(self) -> float | None:
        return self.num_samples / self.seconds if self.seconds else None


@dataclass(frozen=True, slots=True)
class Completion:
    """One sample as text, with its reward and the versions that wrote its tokens."""

    text: str
    reward: float | None = None
    spans: tuple[Span, ...] = ()


@dataclass(frozen=True, slots=True)
class Group:
    """The samples of one prompt."""

    prompt: str
    completions: tuple[Completion, ...] = ()
    num_completions: int | None = None
    """How many were generated, where not all are kept here."""


@dataclass(frozen=True, slots=True)
class SamplesRecord:
    """The samples of one optimizer step, over all ranks. Fields that are unknown are None."""

    global_step: int
    staleness: Spread = Spread()
    """In versions; mean and max."""
    wait_seconds: float | None = None
    """That training waited for the samples, on the rank that waited longest."""
    generate_seconds: float | None = None
    num_regenerated: int | None = None
    """Samples that were generated again, since the first ones were too old."""
    num_mixed: int | None = None
    """Samples that several versions wrote."""
    queue_length: int | None = None
    made_by: Mapping[int, int] = field(default_factory=dict)
    """Number of samples by the oldest version that wrote tokens of them."""
    replicas: Mapping[str, ReplicaWork] = field(default_factory=dict)
    ratio: Spread = Spread()
    """The importance sampling ratio."""
    logp_difference: Spread = Spread()
    """Absolute difference of a token's log probability between replica and trainer."""
    groups: tuple[Group, ...] = ()

    @property
    def num_samples(self) -> int:
        return sum(self.made_by.values())

    def to_record(self) -> Record:
        """Returns the record to write, of at most 64 KiB: the last groups, with texts cut in the middle."""
        facts: Record = {
            "status": "done",
            "global_step": self.global_step,
            "staleness": _spread_json(self.staleness),
            "made_by": {str(version): self.made_by[version] for version in sorted(self.made_by)[-_MAX_ENTRIES:]},
            "replicas": {
                name[:_MAX_NAME_LENGTH]: {"num_samples": work.num_samples, "seconds": _finite(work.seconds)}
                for name, work in islice(sorted(self.replicas.items()), _MAX_ENTRIES)
            },
            "ratio": _spread_json(self.ratio),
            "logp_difference": _spread_json(self.logp_difference),
        }
        facts |= {name: found for name in _NUMBERS if (found := _finite(getattr(self, name))) is not None}
        return facts | {"groups": _fitting_groups(self.groups, MAX_NBYTES - _STAMP_NBYTES - _nbytes(facts))}


def record_name(stage: str, global_step: int) -> str:
    """Returns the name under which a stage's record of a step is stored."""
    return f"{stage}-{global_step}"


def parse_samples(document: Mapping[str, Any]) -> SamplesRecord:
    """Returns the record in bounds. Whatever has another type than it should is left out; nothing is refused."""
    made_by = _mapping(document.get("made_by"))
    counts = {int(v): n for v, held in made_by if _VERSION.fullmatch(v) and (n := _count(held)) is not None}
    replicas = {
        plain_text(name, _MAX_NAME_LENGTH): ReplicaWork(_count(work.get("num_samples")) or 0, _size(work, "seconds"))
        for name, work in _mapping(document.get("replicas"))
        if isinstance(work, Mapping)
    }
    return SamplesRecord(
        global_step=_count(document.get("global_step")) or 0,
        staleness=_parse_spread(document.get("staleness")),
        wait_seconds=_size(document, "wait_seconds"),
        generate_seconds=_size(document, "generate_seconds"),
        num_regenerated=_count(document.get("num_regenerated")),
        num_mixed=_count(document.get("num_mixed")),
        queue_length=_count(document.get("queue_length")),
        made_by=dict(sorted(counts.items())),
        replicas=replicas,
        ratio=_parse_spread(document.get("ratio")),
        logp_difference=_parse_spread(document.get("logp_difference")),
        groups=_parse_groups(document.get("groups")),
    )


def plain_text(value: object, max_length: int = MAX_TEXT_LENGTH) -> str:
    """Returns at most `max_length` characters of a text that UTF-8 can encode; "" for what is no text.

    What is too long is cut in the middle, since the answer of a completion stands at its end.
    """
    if not isinstance(value, str):
        return ""
    if len(value) > max_length:
        num_kept = max_length - len(_CUT)
        value = value[: num_kept - num_kept // 2] + _CUT + value[len(value) - num_kept // 2 :]
    return value if value.isascii() else value.encode("utf-8", "replace").decode()


def _fitting_groups(groups: Sequence[Group], max_nbytes: int) -> list[Record]:
    """Returns the last groups as JSON values; texts are cut shorter until all fit, and then groups are left out."""
    max_length = MAX_TEXT_LENGTH
    kept = list(groups[-MAX_GROUPS:])
    while kept:
        written = [_group_json(group, max_length) for group in kept]
        if _nbytes(written) <= max_nbytes:
            return written
        if max_length > 100:
            max_length //= 2
        else:
            del kept[0]
    return []


def _group_json(group: Group, max_length: int) -> Record:
    return {
        "prompt": plain_text(group.prompt, max_length),
        "num_completions": group.num_completions or len(group.completions),
        "completions": [
            {
                "text": plain_text(one.text, max_length),
                "reward": _finite(one.reward),
                "spans": [[span.version, span.num_tokens] for span in one.spans[:_MAX_ENTRIES]],
            }
            for one in group.completions[:MAX_COMPLETIONS]
        ],
    }


def _nbytes(value: object) -> int:
    """Returns the size of a value inside a record as records are written."""
    text = json.dumps(value, indent=1)
    return len(text) + text.count("\n")


def _parse_groups(value: object) -> tuple[Group, ...]:
    """Returns the last groups. Texts that together are longer than a record can be are cut shorter."""
    groups = [group for group in _sequence(value)[-MAX_GROUPS:] if isinstance(group, Mapping)]
    max_length = MAX_TEXT_LENGTH
    while True:
        found = tuple(_parse_group(group, max_length) for group in groups)
        if sum(len(group.prompt) + sum(len(one.text) for one in group.completions) for group in found) <= MAX_NBYTES:
            return found
        max_length //= 2


def _parse_group(group: Mapping[str, Any], max_length: int) -> Group:
    completions = _sequence(group.get("completions"))[:MAX_COMPLETIONS]
    found = tuple(_parse_completion(one, max_length) for one in completions if isinstance(one, Mapping))
    num_completions = _count(group.get("num_completions"))
    return Group(plain_text(group.get("prompt"), max_length), found, max(num_completions or 0, len(found)))


def _parse_completion(one: Mapping[str, Any], max_length: int) -> Completion:
    spans = (span for span in _sequence(one.get("spans"))[:_MAX_ENTRIES] if isinstance(span, list) and len(span) == 2)
    counted = ((_count(version), _count(num_tokens)) for version, num_tokens in spans)
    return Completion(
        plain_text(one.get("text"), max_length),
        _finite(one.get("reward")),
        tuple(Span(version, num) for version, num in counted if version is not None and num is not None),
    )


def _parse_spread(value: object) -> Spread:
    held = value if isinstance(value, Mapping) else {}
    return Spread(*(_finite(held.get(name)) for name in ("mean", "min", "max")))


def _spread_json(spread: Spread) -> dict[str, float]:
    found = {name: _finite(getattr(spread, name)) for name in ("mean", "min", "max")}
    return {name: number for name, number in found.items() if number is not None}


def _mapping(value: object) -> Iterable[tuple[str, Any]]:
    return islice(value.items(), _MAX_ENTRIES) if isinstance(value, Mapping) else ()


def _sequence(value: object) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else ()


def _size(document: Mapping[str, Any], name: str) -> float | None:
    number = _finite(document.get(name))
    return None if number is None or number < 0 else number


def _count(value: object) -> int | None:
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    return value if is_whole and 0 <= value <= _MAX_INTEGER else None  # type: ignore[operator,return-value]


def _finite(value: object) -> float | None:
    """Returns a finite number; None for any other value, an integer beyond all floats included."""
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e300:
        return None
    return value if math.isfinite(value) else None
