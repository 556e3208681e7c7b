"""A version given away: the bits are the version's, and the card says where they come from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.chains import commit_state, nudged, random_state
from tests.release.model_repos import ModelRepos, serving_repos
from tests.runs.recipes import write_recipe
from weightline.chain import Chain, open_chain
from weightline.chain.read.records import EVALUATIONS, write_record
from weightline.errors import InputError, StorageError
from weightline.flows.publish_model import publish_model
from weightline.lineage.text import escape_markdown
from weightline.release.model_card import CardFacts, Score, card_body, card_facts, model_card
from weightline.release.model_repo import upload_model
from weightline.runs.prepare import prepare_run
from weightline.runs.recipes import recorded_recipe
from weightline.runs.stage import differing_tensors


@pytest.fixture
def chain(tmp_path: Path) -> Chain:
    """Two versions by run-1, whose recipe is recorded; the second one evaluated."""
    run = prepare_run(write_recipe(tmp_path), tmp_path / "runs", "run-1")
    chain = run.open_chain()
    state = random_state(0)
    commit_state(chain, state, is_milestone=True)
    commit_state(chain, nudged(state, 1), state, stage="dpo")
    write_record(chain, EVALUATIONS, 1, "arithmetic", {"status": "done", "score": 0.75, "num_problems": 400})
    write_record(chain, EVALUATIONS, 0, "arithmetic", {"status": "done", "score": 0.125, "num_problems": 400})
    return chain


@pytest.fixture
def repos(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ModelRepos]:
    from huggingface_hub import HfApi, constants

    with serving_repos() as repos:
        monkeypatch.setattr(constants, "ENDPOINT", repos.url)
        monkeypatch.setenv("HF_TOKEN", "hf_test")
        monkeypatch.setattr("huggingface_hub.HfApi", lambda: HfApi(endpoint=repos.url, token="hf_test"))
        yield repos


def _front(card: str) -> dict[str, object]:
    front: dict[str, object] = yaml.safe_load(card.split("---\n")[1])
    return front


def _card(chain: Chain, version: int, license_id: str | None = None) -> str:
    recipe = recorded_recipe(chain, version)
    return model_card(card_facts(chain, version, recipe.model if recipe else None, license_id))


def test_a_card_states_the_lineage(chain: Chain) -> None:
    card = _card(chain, 1, "apache-2.0")
    front = _front(card)
    assert front["license"] == "apache-2.0"
    assert front["library_name"] == "transformers"
    assert front["tags"] == ["weightline", "trl", "sft", "dpo"]
    assert "base_model" not in front  # made from nothing
    manifest = chain.manifest(1)
    assert chain.url in card
    assert manifest.commit_id in card
    run_id = escape_markdown("run-1")
    assert f"| v0 | sft | {run_id} | 0 |" in card
    assert f"| v1 | dpo | {run_id} | 1 |" in card
    assert "| arithmetic | 0.7500 | 400 |" in card
    assert "0.1250" not in card  # another version's
    for digest in manifest.digests.values():
        assert digest in card
    assert card_body(card).startswith("# ")
    assert card.endswith(f"---\n{card_body(card)}")
    assert "This version was not evaluated" in _card(_bare("uneval"), 0)


def _bare(name: str) -> Chain:
    chain = open_chain(f"memory://{name}")
    commit_state(chain, random_state(0))
    return chain


def test_a_hub_model_is_named_as_the_base(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, model={"path": "Qwen/Qwen3-0.6B"})
    run = prepare_run(recipe, tmp_path / "runs", "run-1")
    commit_state(run.open_chain(), random_state(0))
    card = _card(run.open_chain(), 0)
    assert _front(card)["base_model"] == "Qwen/Qwen3-0.6B"
    assert "(https://huggingface.co/Qwen/Qwen3-0.6B)" in card


def test_names_from_the_bucket_are_text(chain: Chain) -> None:
    hostile = chain.manifest(1).model_copy(update={"stage": "a|b<script>", "run_id": "[x](http://evil)"})
    card = model_card(
        CardFacts(chain.url, "<b>name</b>", [hostile], hostile, (Score("c|d<script>", None, None),), None)
    )
    assert "<script>" not in card
    assert "[x](http" not in card
    assert "a|b" not in card
    assert "c|d" not in card
    assert "<b>" not in card


def test_a_version_becomes_a_folder_and_a_repository(
    server: str, chain: Chain, repos: ModelRepos, tmp_path: Path
) -> None:
    folder = tmp_path / "given"
    for _ in range(2):
        told = publish_model(chain.url, folder=str(folder), repo_id="me/model")
        assert (told.version, told.folder, told.repo_url) == (1, str(folder), f"{repos.url}/me/model")
    assert differing_tensors(chain, 1, folder) == []
    files = repos.files["me/model"]
    assert sorted(files) == ["README.md", "model.safetensors"]  # not the marker, which is this host's
    assert files["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert files["README.md"] == (folder / "README.md").read_bytes()
    assert repos.is_private["me/model"]
    assert "v1" in repos.messages[0]


def test_a_refusal_says_what_to_do(repos: ModelRepos, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("hello")
    repos.refuses = True
    with pytest.raises(StorageError, match="HF_TOKEN"):
        upload_model(tmp_path, "me/model", is_private=True, message="m")


def test_a_release_needs_a_place(server: str) -> None:
    with pytest.raises(InputError, match="folder, repo_id: name a folder"):
        publish_model("memory://nowhere")
