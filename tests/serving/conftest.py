"""What the tests of replicas share."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.serving.model_chains import ModelChain, make_chain
from weightline.serving.engines.transformers import TransformersEngine
from weightline.serving.replica.replica import Replica


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def grown() -> ModelChain:
    """Three versions of an untied Qwen3."""
    return make_chain(f"memory://{uuid.uuid4().hex}/toy", num_versions=3)


@pytest.fixture
def replica(grown: ModelChain, tmp_path: Path) -> Replica:
    """A replica that has loaded version 0."""
    made = Replica(grown.chain, TransformersEngine("cpu"), tmp_path / "state", "replica-0")
    made.refresh(0)
    return made
