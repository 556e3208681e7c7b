"""The weight-transfer backend, driven by vLLM's own weight-update calls."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.vllm.parts import checksums, greedy_tokens, make_chain, offline, reference_tokens
from weightline.chain.replay.state import read_state
from weightline.codec.capture import capture_tensors
from weightline.codec.changes import inverse
from weightline.serving.engines.vllm.wire import write_changes
from weightline.serving.replica.replica import Replica


def test_vllms_own_calls_move_it_forth_and_back_and_a_wrong_base_is_not_written_to(tmp_path: Path) -> None:
    made = make_chain(tmp_path, "llama", num_versions=2)
    with offline(made, weight_transfer_config={"backend": "weightline"}) as (engine, llm):
        replica = Replica(made.chain, engine, tmp_path / "state", "replica-0")
        replica.refresh(0)
        before = checksums(llm)
        old, new = (read_state(made.chain, version) for version in (0, 1))
        changes = list(capture_tensors(new.specs.values(), old.bits, new.bits))
        write_changes(tmp_path / "forth", changes)
        write_changes(tmp_path / "back", [inverse(one) for one in changes])
        llm.collective_rpc("init_weight_transfer_engine", kwargs={"init_info": {"folder": str(made.folders[0])}})
        _update(llm, tmp_path / "forth")
        assert greedy_tokens(llm) == reference_tokens(made.folders[1])
        after = checksums(llm)
        with pytest.raises(Exception, match="does not hold the bits"):
            _update(llm, tmp_path / "forth")
        # vLLM has closed the session of the failed update by itself.
        assert checksums(llm) == after
        _update(llm, tmp_path / "back")
        assert checksums(llm) == before


def _update(llm: object, path: Path) -> None:
    llm.collective_rpc("start_weight_update")
    llm.collective_rpc("update_weights", kwargs={"update_info": {"path": str(path)}})
    llm.collective_rpc("finish_weight_update")
    llm.reset_prefix_cache()
