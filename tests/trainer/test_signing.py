"""A trainer with a signing key: all that it writes is signed, and a key that cannot be used ends it before training."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.trainer.test_session import Model, _session, _train
from weightline.chain.read.history import Chain
from weightline.chain.upkeep.compact import AnchorPolicy
from weightline.chain.upkeep.verify import verify_chain
from weightline.errors import InputError
from weightline.format import keys
from weightline.format.signature import SIGNING_KEY_VARIABLE, generate_key, load_trusted_keys
from weightline.store.memory import MemoryStore


def test_versions_and_anchors_of_a_run_are_signed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generate_key(tmp_path / "key")
    monkeypatch.setenv(SIGNING_KEY_VARIABLE, str(tmp_path / "key"))
    chain, model = Chain(MemoryStore()), Model()
    session = _session(chain, anchor_policy=AnchorPolicy(delta_elements_per_second=1e-3))
    session.start(model, None, 0)
    _train(session, model, 3)
    assert any(True for _ in chain.store.list(keys.SHORTCUTS))
    demanding = Chain(chain.store, load_trusted_keys(tmp_path / "key.pub"))
    report = verify_chain(demanding)
    assert (report.num_versions, report.findings) == (4, ())
    assert report.num_shortcuts > 0


def test_a_key_that_cannot_be_used_ends_the_run_before_it_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SIGNING_KEY_VARIABLE, str(tmp_path / "nothing"))
    chain = Chain(MemoryStore())
    with pytest.raises(InputError, match="no key can be read"):
        _session(chain).start(Model(), None, 0)
    assert not list(chain.store.list(""))
