"""Upkeep: a chain that holds is made shorter and lighter, one that does not is left alone."""

from __future__ import annotations

import pytest
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey

from tests.chains import commit_state, nudged, random_state
from weightline.chain import Chain, open_chain
from weightline.chain.upkeep.retention import first_of_newest
from weightline.chain.upkeep.verify import verify_chain
from weightline.errors import ChainEmptyError, CorruptError
from weightline.flows.maintain_chain import maintain_chain
from weightline.format import keys
from weightline.lineage.pages import UpkeepResult, upkeep_markdown

SHAPES = {"model.embed.weight": (400, 64), "model.norm.weight": (64,)}


def _grown(name: str, num_versions: int = 6) -> Chain:
    chain = open_chain(f"memory://{name}")
    state = random_state(0, SHAPES)
    commit_state(chain, state)
    for version in range(1, num_versions):
        moved = nudged(state, version)
        commit_state(chain, moved, state)
        state = moved
    return chain


def _texts(outcomes: list[UpkeepResult]) -> dict[str, str]:
    return {outcome.verb: outcome.text for outcome in outcomes}


def test_a_page_says_what_each_step_did() -> None:
    page = upkeep_markdown("memory://x|y", [UpkeepResult("verify", "3 versions | all holds")])
    assert "`memory://x|y`" in page
    assert page.splitlines()[-1] == "| verify | 3 versions \\| all holds |"


def test_the_newest_versions_are_kept() -> None:
    chain = _grown("kept", 3)
    assert [first_of_newest(chain, number) for number in (1, 2, 3, 9)] == [2, 1, 0, 0]


def test_upkeep_shortens_a_chain_and_deletes_nothing_unless_told(client: SyncPrefectClient) -> None:
    chain = _grown("upkept")
    before = {info.key for info in chain.store.list("")}
    told = _texts(maintain_chain(chain.url, keep_versions=2, grace_hours=1.0))
    assert told["verify"].startswith("6 versions")
    assert told["expire"] == "the oldest kept version is 4, it was 0"
    assert told["collect garbage"].endswith("would be deleted")
    assert before <= {info.key for info in chain.store.list("")}
    assert list(chain.store.list(keys.SHORTCUTS))
    shown = client.read_artifacts(artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=["upkeep-upkept"])))
    assert "the oldest kept version is 4" in str(shown[0].data)

    told = _texts(maintain_chain(chain.url, delete_garbage=True, write_shortcuts=False))
    assert told["collect garbage"].startswith("0 objects")  # all of it is younger than the grace
    assert verify_chain(chain).holds


def test_a_chain_that_does_not_hold_is_left_as_it_is(server: str) -> None:
    chain = _grown("broken", 3)
    chain.store.delete(chain.manifest(1).payloads[0].key)
    before = [info.key for info in chain.store.list("")]
    with pytest.raises(CorruptError, match="object-missing"):
        maintain_chain(chain.url, delete_garbage=True, grace_hours=1.0)
    assert [info.key for info in chain.store.list("")] == before
    with pytest.raises(ChainEmptyError, match=r"^chain: memory://no-such holds no version"):
        maintain_chain("memory://no-such")
