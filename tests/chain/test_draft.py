"""What follows for a manifest from what its writer knows: the same for the trainer and for versions made by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from weightline.chain.write.draft import Authorship, Draft
from weightline.codec.anchor import ANCHOR_CODING
from weightline.codec.digest import format_digest
from weightline.errors import InputError
from weightline.format import keys
from weightline.format.manifest import Manifest
from weightline.types import TensorSpec

SPECS = {spec.name: spec for spec in (TensorSpec("a", "BF16", (3, 5)), TensorSpec("b", "F32", (2,)))}
DELTA = Authorship(stage="sft", run_id="r", global_step=9, kind="delta", coding="gap", is_milestone=False)


def _manifest(author: Authorship, version: int) -> Manifest:
    draft = Draft(version, "0" * 32)
    for rank in (0, 1):
        draft.add(rank, 100 + rank, "0" * 64, num_changed=2)
    return draft.manifest(author, SPECS, {"a": 1, "b": 2}, world_size=2)


def test_counts_are_those_of_the_tensors_and_payloads() -> None:
    manifest = _manifest(DELTA, 3)
    assert (manifest.base_version, manifest.coding, manifest.num_changed) == (2, "gap", 4)
    assert (manifest.num_elements, manifest.full_nbytes, manifest.payload_nbytes) == (17, 38, 201)
    assert [payload.key for payload in manifest.payloads] == [keys.payload(3, "0" * 32, rank) for rank in (0, 1)]
    assert manifest.specs == SPECS
    assert manifest.digests == {"a": format_digest(1), "b": format_digest(2)}


def test_an_anchor_has_no_base_a_coding_of_its_own_and_changes_all() -> None:
    manifest = _manifest(replace(DELTA, kind="anchor"), 0)
    assert (manifest.base_version, manifest.coding, manifest.num_changed) == (None, ANCHOR_CODING, 17)


def test_facts_that_contradict_each_other_make_no_manifest() -> None:
    with pytest.raises(InputError, match="reverts_to goes with kind revert"):
        _manifest(replace(DELTA, kind="revert"), 3)
    with pytest.raises(InputError, match="base_version"):
        _manifest(DELTA, 0)
