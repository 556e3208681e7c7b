"""Replicas on toy workers, whose shared memory is freed after each test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.serving.engines.served import Served


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Served]]:
    """Returns a function that makes replicas: `serve(world_size, coding)`."""
    with ExitStack() as stack:

        def make(world_size: int, coding: str = "gap") -> Served:
            made = Served(world_size, tmp_path, coding)
            stack.callback(made.engine.close)
            return made

        yield make
