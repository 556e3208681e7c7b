"""The four steps that publish one version, as a seam: by default they just run; tasks/ records them as Prefect tasks.

A `PublishSteps` gets each step as a `StepWork` on the rank's background thread, in order, and must call `work.run()`
exactly once and return what it returned. `WEIGHTLINE_STEPS=module:function` names a zero-argument factory.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from weightline.errors import InputError

STEPS_VARIABLE = "WEIGHTLINE_STEPS"

Facts = dict[str, Any]


@dataclass(frozen=True, slots=True)
class StepWork:
    """One step of one rank for one version."""

    name: str
    version: int
    rank: int
    world_size: int
    stage: str
    chain_url: str
    run: Callable[[], Facts]
    """Does the step; returns small JSON-able facts. Not safe to repeat."""


class PublishSteps(Protocol):
    """Runs the steps. Must not raise anything but what `work.run()` raises."""

    def gather_partition(self, work: StepWork) -> Facts:
        """Assemble what changed in the rank's own partition."""
        ...

    def compute_delta(self, work: StepWork) -> Facts:
        """Encode the changes into a payload file."""
        ...

    def upload_payload(self, work: StepWork) -> Facts:
        """Put the payload into the bucket."""
        ...

    def commit_version(self, work: StepWork) -> Facts:
        """Write the manifest (rank 0 only)."""
        ...


class PlainSteps:
    """Just runs them."""

    def gather_partition(self, work: StepWork) -> Facts:
        return work.run()

    def compute_delta(self, work: StepWork) -> Facts:
        return work.run()

    def upload_payload(self, work: StepWork) -> Facts:
        return work.run()

    def commit_version(self, work: StepWork) -> Facts:
        return work.run()


def load_steps(path: str | None) -> PublishSteps:
    """The steps that `module:function` makes; the environment's when `path` is None; plain ones when neither is set."""
    path = path or os.environ.get(STEPS_VARIABLE)
    if not path:
        return PlainSteps()
    module_name, _, attribute = path.partition(":")
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise InputError(
            f"{STEPS_VARIABLE}={path!r} names nothing that can be imported: {error}", steps=path
        ) from error
    steps: PublishSteps = factory()
    return steps
