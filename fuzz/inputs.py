"""Provides seeds and limits for all fuzz targets."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

ROOT = Path(__file__).parent.parent
CASES = ROOT / "tests" / "conformance" / "cases"
#: A target that needs more memory for one input has a bug.
MEMORY_LIMIT_MIB = 2048
MAX_INPUT_NBYTES = 1 << 14


def conformance_payloads() -> list[bytes]:
    """Returns the payloads of the conformance cases, both valid and refused ones."""
    found = [case["payload"] for topic in ("deltas", "anchors", "refused") for case in load(topic)]
    return [bytes.fromhex(payload) for payload in found]


def load(topic: str) -> list[dict[str, str]]:
    cases: list[dict[str, str]] = json.loads((CASES / f"{topic}.json").read_text())
    return cases


def fuzz(name: str, target: Callable[[bytes], None], seeds: Iterable[bytes]) -> None:
    """Runs the target until it fails or reaches the limits on the command line, whose options are libFuzzer's.

    Inputs that reach new code are kept in runs/fuzz/<name>/, and failing inputs are written there as well. The module
    under test must have been imported within atheris.instrument_imports().
    """
    import atheris

    corpus = ROOT / "runs" / "fuzz" / name
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(seeds):
        (corpus / f"seed-{number:04}").write_bytes(seed)
    limits = [f"-rss_limit_mb={MEMORY_LIMIT_MIB}", f"-max_len={MAX_INPUT_NBYTES}", f"-artifact_prefix={corpus}/found-"]
    atheris.Setup([sys.argv[0], *limits, *sys.argv[1:], str(corpus)], target)
    atheris.Fuzz()
