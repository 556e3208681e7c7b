"""The task of giving a version away: a checkpoint folder with its model card, on disk and as a Hub repository."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from prefect import get_run_logger, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE

from weightline.chain import Chain, open_chain
from weightline.chain.files.checkpoint import write_checkpoint
from weightline.chain.read.records import EVALUATIONS, read_records
from weightline.chain.read.refs import resolve
from weightline.deployments.server.artifacts import artifact_key
from weightline.errors import InputError
from weightline.release.hub_repo import upload_model
from weightline.release.model_card import CARD, CardFacts, model_card
from weightline.runs.checks import PATIENCE_SECONDS, check_chain, check_folder, check_form
from weightline.stages.job import write_atomically
from weightline.tasks.evaluation import recipe_of


@dataclass(frozen=True, slots=True)
class Release:
    """What was given away, and where."""

    chain: str
    version: int
    commit_id: str
    folder: str | None
    repo_url: str | None


def check_release(chain: str, version: str, folder: str | None, repo_id: str | None) -> None:
    """Before anything is read: there is somewhere to write to, and the version is there. Errors name the field."""
    if folder is None and repo_id is None:
        raise InputError("folder, repo_id: name a folder, a Hub repository, or both", field="folder")
    opened = check_chain(chain, PATIENCE_SECONDS)
    with check_form("version"):
        resolve(opened, version)
    check_folder(folder)


@task(task_run_name="publish {version}", cache_policy=NO_CACHE, persist_result=False)
def release(
    chain: str, version: str, folder: str | None, repo_id: str | None, is_private: bool, license_id: str | None
) -> Release:
    """Write the checkpoint with its card, then upload it. Safe to repeat: what is there already stays as it is."""
    opened = open_chain(chain)
    number = resolve(opened, version)
    with tempfile.TemporaryDirectory(prefix="weightline-release-") as scratch:
        target = Path(folder).expanduser().absolute() if folder is not None else Path(scratch) / "model"
        write_checkpoint(opened, number, target)
        card = model_card(card_facts(opened, number, license_id))
        write_atomically(target / CARD, card)
        url = None
        if repo_id is not None:
            what = f"{opened.name} v{number} ({opened.manifest(number).commit_id[:12]})"
            url = upload_model(target, repo_id, is_private=is_private, message=what)
    get_run_logger().info("version %d of %s: %s", number, chain, url or target)
    body = card.split("---\n", 2)[-1]
    create_markdown_artifact(body, key=artifact_key(f"card-{opened.name}"), description=f"Model card of v{number}")
    kept = None if folder is None else str(target)
    return Release(chain, number, opened.manifest(number).commit_id, kept, url)


def card_facts(chain: Chain, version: int, license_id: str | None = None) -> CardFacts:
    """All that a card says, read from the bucket: every manifest up to the version, and its records."""
    manifests = chain.manifests(last=version)
    records = [record for record in read_records(chain, EVALUATIONS) if record["version"] == version]
    recipe = recipe_of(chain, version)
    return CardFacts(chain.url, chain.name, manifests, tuple(records), recipe.model if recipe else None, license_id)
