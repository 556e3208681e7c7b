"""Defines the condition under which Prefect retries a task."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from prefect.client.schemas.objects import State


def retry_on(*errors: type[BaseException]) -> Callable[[Any, Any, State[Any]], bool]:
    """Returns a `retry_condition_fn`: the task is retried when it failed with one of these errors, and only then."""

    def is_retried(task: Any, task_run: Any, state: State[Any]) -> bool:
        return isinstance(state.result(raise_on_failure=False), errors)

    return is_retried
