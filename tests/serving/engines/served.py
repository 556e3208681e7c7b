"""A replica on toy workers, with a chain that it can move along."""

from __future__ import annotations

import uuid
from pathlib import Path

import numpy as np

from tests.chains import commit_state, nudged, random_state
from tests.serving.engines.sharded import SHAPES, ToyTransport, toy_engine
from weightline.chain import Chain, open_chain
from weightline.serving.engines.base import GenerationRequest
from weightline.serving.engines.vllm.driver import VllmEngine
from weightline.serving.replica.replica import Replica, prove_weights
from weightline.serving.replica.status import read_mark

ASK = GenerationRequest(("a",), max_tokens=1)


class Served:
    """A replica on toy workers at version 0 of a chain with three versions."""

    def __init__(self, world_size: int, folder: Path, coding: str = "gap") -> None:
        self.chain: Chain = open_chain(f"memory://{uuid.uuid4().hex}/toy")
        self.states = [random_state(0, SHAPES)]
        commit_state(self.chain, self.states[0])
        for version in (1, 2):
            self.states.append(nudged(self.states[-1], version, 0.3))
            commit_state(self.chain, self.states[-1], self.states[-2], coding=coding)
        self.engine: VllmEngine
        self.transport: ToyTransport
        self.engine, self.transport = toy_engine(world_size, folder)
        self.replica = Replica(self.chain, self.engine, folder / "state", "toy")
        self.replica.refresh(0)

    def assert_at(self, version: int) -> None:
        """Read back through the mapping, the digests computed where the parts are, the mark, and the answers."""
        for name, bits in self.states[version].items():
            np.testing.assert_array_equal(self.engine.read_bits(name), bits.reshape(-1), err_msg=name)
        prove_weights(self.engine, self.chain, version)
        mark = read_mark(self.replica.state_dir)
        assert mark is not None
        assert (mark.status, mark.version) == ("checked", version)
        assert self.engine.generate(ASK).version == version
