"""The engine that drives a vLLM, on toy workers: what it proves, what it undoes, what it refuses."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

from tests.chains import commit_state
from tests.serving.engines.served import Served
from tests.waiting import PATIENCE_SECONDS
from weightline.errors import ApplyError, BaseMismatchError, DigestMismatchError, UnsupportedFeatureError
from weightline.format import keys
from weightline.format.manifest import AssetRef
from weightline.serving.engines.vllm.wire import allocate, exchange_folder
from weightline.serving.http.service import ReplicaService
from weightline.serving.replica.following import Following
from weightline.serving.replica.replica import prove_weights


@pytest.fixture(params=[1, 2, 4])
def served(request: pytest.FixtureRequest, serve: Callable[..., Served]) -> Served:
    return serve(request.param)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("coding", ["gap", "gap-by-magnitude"])
def test_an_engine_moves_forth_and_back_bit_for_bit(coding: str, world_size: int, serve: Callable[..., Served]) -> None:
    served = serve(world_size, coding)
    for version in (1, 2, 0, 2):
        served.replica.refresh(version, allow_backward=True)
        served.assert_at(version)


def test_all_is_staged_before_the_pause_and_caches_are_dropped_within_it(served: Served) -> None:
    served.transport.events.clear()
    served.replica.refresh(1)
    assert served.transport.events == ["pause", "version None", "drop prefixes", "version 1", "resume"]


def test_padding_stays_what_it_was(served: Served) -> None:
    served.replica.refresh(2)
    for model in served.transport.models:
        assert not model.embed[model.vocab_rows :].any()


class _TornError(RuntimeError):
    pass


def test_a_write_that_fails_on_one_worker_is_undone_on_all(served: Served) -> None:
    world_size = len(served.transport.workers)
    for torn_rank in range(world_size):
        calls: list[int] = []

        def fail(rank: int, calls: list[int] = calls, torn_rank: int = torn_rank) -> None:
            calls.append(rank)
            if rank == torn_rank and calls.count(rank) == 1:
                raise _TornError

        served.transport.on_write = fail
        with pytest.raises(ApplyError, match="TornError"):
            served.replica.refresh(1)
        served.transport.on_write = lambda rank: None
        served.assert_at(0)
    served.replica.refresh(1)
    served.assert_at(1)


def test_when_a_worker_cannot_go_back_the_version_is_loaded_again(served: Served) -> None:
    def fail(rank: int) -> None:
        raise _TornError

    served.transport.on_write = fail
    with pytest.raises(ApplyError, match="TornError"):
        served.replica.refresh(1)
    served.assert_at(0)


def test_a_worker_that_lost_its_base_is_not_written_to_but_loaded_again(served: Served) -> None:
    """The chain is right, the numbers agree, but one element of one worker's memory is not the version's."""
    prepared = served.replica.prepare(1)
    position = int(np.flatnonzero(served.states[0]["norm.weight"] != served.states[1]["norm.weight"])[0])
    served.transport.models[-1].norm.data[position] = 77
    with pytest.raises(BaseMismatchError, match=r"norm\.weight does not hold the bits"):
        served.replica.apply(prepared)
    served.assert_at(0)


@pytest.mark.parametrize("served", [2, 4], indirect=True)
def test_copies_that_differ_are_found(served: Served) -> None:
    served.transport.models[-1].norm.data[0] = 77
    with pytest.raises(ApplyError, match=r"two workers hold different bits of one part of norm\.weight"):
        prove_weights(served.engine, served.chain, 0)


def test_a_flipped_bit_anywhere_is_found_by_the_full_proof(served: Served) -> None:
    served.transport.models[0].o.data[0, 0] = 77
    with pytest.raises(DigestMismatchError, match=r"tensor o\.weight"):
        prove_weights(served.engine, served.chain, 0)


def test_parts_that_do_not_add_up_are_undone(served: Served) -> None:
    """A worker that answers for something it did not write: the sum over workers is not the manifest's."""

    def forget(rank: int) -> None:
        staged = served.transport.workers[rank]._staged
        assert staged is not None
        staged.digests.pop("norm.weight", None)

    served.transport.on_write = forget
    with pytest.raises(DigestMismatchError, match=r"do not add up to the change of norm\.weight"):
        served.replica.refresh(1)
    served.assert_at(0)


def _commit_with_file(served: Served, name: str, content: bytes) -> int:
    """The tip's weights once more, with a small file beside them."""
    sha256 = hashlib.sha256(content).hexdigest()
    asset = AssetRef(key=keys.asset(sha256), nbytes=len(content), sha256=sha256, name=name)
    served.chain.store.put(asset.key, content)
    served.states.append(served.states[-1])
    return commit_state(served.chain, served.states[-1], served.states[-1], assets=(asset,)).version


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "chat_template.jinja", "modeling_own.py"])
def test_what_vllm_read_at_its_start_needs_a_restart_and_is_refused_before_anything_moves(
    served: Served, name: str
) -> None:
    version = _commit_with_file(served, name, b"{}")
    served.transport.events.clear()
    with pytest.raises(UnsupportedFeatureError, match=f"{name} of this version is not the one"):
        served.replica.refresh(version)
    assert served.transport.events == []
    served.assert_at(0)


def test_a_file_that_says_the_same_needs_no_restart(tmp_path: Path, serve: Callable[..., Served]) -> None:
    """A tokenizer that was loaded offline gains `local_files_only`, and another machine has another path."""
    (tmp_path / "tokenizer_config.json").write_text('{"model_max_length": 8}')
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("{{ a }}")
    served = serve(2)
    said_again = b'{"name_or_path": "/elsewhere", "local_files_only": true, "model_max_length": 8}'
    version = _commit_with_file(served, "tokenizer_config.json", said_again)
    served.replica.refresh(version)
    served.assert_at(version)
    served.replica.refresh(_commit_with_file(served, "additional_chat_templates/rag.jinja", b"{{ a }}"))
    version = _commit_with_file(served, "additional_chat_templates/rag.jinja", b"{{ b }}")
    with pytest.raises(UnsupportedFeatureError, match=r"rag\.jinja of this version is not the one"):
        served.replica.refresh(version)


def test_a_file_that_vllm_never_reads_may_change(served: Served) -> None:
    version = _commit_with_file(served, "train_results.json", b"{}")
    served.replica.refresh(version)
    served.assert_at(version)


def test_a_follower_asks_once_for_what_its_engine_will_never_serve(served: Served) -> None:
    _commit_with_file(served, "config.json", b"{}")
    looks: list[None] = []
    honest = served.engine.require_assets

    def counted(sha256_of: Mapping[str, str], meaning_of: Callable[[str], str]) -> None:
        looks.append(None)
        honest(sha256_of, meaning_of)

    served.engine.require_assets = counted  # type: ignore[method-assign]
    service = ReplicaService(served.replica, Following(0.05))
    follower = service._follower
    assert follower is not None
    assert all(service._follow_once(follower) for _ in range(3))
    assert len(looks) == 1
    assert "config.json" in str(served.replica.status().last_error)
    served.assert_at(0)


def test_no_room_in_shared_memory_is_an_error_and_not_a_signal() -> None:
    with exchange_folder() as folder:
        with pytest.raises(ApplyError, match=r"no room for 4611686018427387904 bytes.*--shm-size"):
            allocate(folder / "1.bin", 2**62)
        assert [path.name for path in folder.iterdir()] == ["lock"]


def test_no_shared_memory_is_left(served: Served) -> None:
    folder = served.engine._folder
    served.replica.refresh(1)
    assert [path.name for path in folder.iterdir()] == ["lock"]
    served.engine.close()
    assert not folder.exists()


@pytest.mark.process
def test_what_a_killed_process_left_in_shared_memory_is_removed_and_what_a_living_one_holds_is_not() -> None:
    program = (
        "import os, signal\n"
        "from weightline.serving.engines.vllm.wire import exchange_folder\n"
        "with exchange_folder() as folder:\n"
        "    print(folder, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False
    )
    left = Path(killed.stdout.strip())
    assert left.is_dir()
    with exchange_folder() as held:
        assert not left.exists()
        with exchange_folder():
            assert held.is_dir()
