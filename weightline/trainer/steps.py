"""The four steps by which a rank publishes a version, and the interface of their observers.

The trainer does the work of a step itself, once, in the frame that needs its result. An observer receives each step
when it begins and may wait for its end on a thread of its own, as `weightline.tasks.sync_steps` does to show the steps
as Prefect task runs. An observer cannot change the work of a step or its timing.
"""

from __future__ import annotations

import importlib
import os
from concurrent.futures import Future
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Protocol, Self

from weightline.errors import InputError
from weightline.format.manifest import Header

#: Environment variable: the factory of a step observer, as `module:function`, for callers that pass none.
OBSERVER_VARIABLE = "WEIGHTLINE_STEP_OBSERVER"

StepName = Literal["gather_partition", "compute_delta", "upload_payload", "commit_version"]


@dataclass(frozen=True, slots=True)
class StepFacts:
    """The result of a step. A field that does not apply to the step is None."""

    num_changed: int | None = None
    """Number of changed elements: of this rank's partition, or of the whole model for a commit."""
    num_elements: int | None = None
    """Number of all elements of that partition or model."""
    payload_nbytes: int | None = None
    """Bytes of this rank's payload, or of all payloads for a commit."""
    manifest: Header | None = None
    """The manifest that a commit wrote."""

    @classmethod
    def of_commit(cls, manifest: Header) -> StepFacts:
        """Returns the facts of the step that wrote this manifest."""
        return cls(manifest.num_changed, manifest.num_elements, manifest.payload_nbytes, manifest)


class Step:
    """One step of one rank for one version: a context manager around the work.

    The work calls `report` with its result. The end of the block ends the step, with the block's error if it raised.
    """

    def __init__(
        self, name: StepName, version: int, rank: int, world_size: int, chain_url: str, observer: StepObserver
    ) -> None:
        self.name = name
        self.version = version
        self.rank, self.world_size = rank, world_size
        self.chain_url = chain_url
        self._observer = observer
        self._facts = StepFacts()
        self._ended: Future[StepFacts] = Future()

    def report(self, facts: StepFacts) -> None:
        """Sets the step's result. The work calls this at its end."""
        self._facts = facts

    def wait(self) -> StepFacts:
        """Waits for the end of the step; returns its result or raises its error. For observers, from any thread."""
        return self._ended.result()

    @property
    def has_failed(self) -> bool:
        """Returns whether the step has ended with an error."""
        return self._ended.done() and self._ended.exception() is not None

    def __enter__(self) -> Self:
        self._observer.observe(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self._ended.set_result(self._facts)
        else:
            self._ended.set_exception(error)


class StepObserver(Protocol):
    """Watches the steps of a rank."""

    def observe(self, step: Step) -> None:
        """Receives a step that begins, on the rank's background thread. Must return at once and raise nothing."""
        ...

    def close(self) -> None:
        """Ends the observation after training, on the training thread. May wait a bounded time. Must raise nothing."""
        ...


class NoObserver:
    """An observer that does nothing."""

    def observe(self, step: Step) -> None:
        return

    def close(self) -> None:
        return


def load_observer(path: str | None) -> StepObserver:
    """Returns the observer that the factory `module:function` makes.

    Without a path the environment variable WEIGHTLINE_STEP_OBSERVER is used, and without that nothing is observed.
    Raises InputError when the path cannot be imported.
    """
    path = path or os.environ.get(OBSERVER_VARIABLE)
    if not path:
        return NoObserver()
    module_name, _, attribute = path.partition(":")
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise InputError(
            f"the step observer {path!r} cannot be imported: {error}. Name it as module:function", step_observer=path
        ) from error
    observer: StepObserver = factory()
    return observer
