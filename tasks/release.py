"""Publishes a version as a checkpoint folder with a model card, on disk and on the Hub, as a Prefect task."""

from __future__ import annotations

import tempfile
from pathlib import Path

from prefect import get_run_logger, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE

from weightline.chain import open_chain
from weightline.chain.read.refs import resolve
from weightline.deployments.server.artifacts import artifact_key
from weightline.files import user_path
from weightline.release.model_card import card_body
from weightline.release.model_repo import Release, upload_model, write_model
from weightline.runs.recipes import recorded_recipe


@task(task_run_name="publish {version}", cache_policy=NO_CACHE, persist_result=False)
def release(
    chain: str, version: str, folder: str | None, repo_id: str | None, is_private: bool, license_id: str | None
) -> Release:
    """Writes the checkpoint with its card, then uploads it. Safe to repeat: existing files are not changed."""
    opened = open_chain(chain)
    number = resolve(opened, version)
    commit_id, recipe = opened.header(number).commit_id, recorded_recipe(opened, number)
    url = None
    with tempfile.TemporaryDirectory(prefix="weightline-release-") as scratch:
        target = user_path(folder).absolute() if folder is not None else Path(scratch) / "model"
        card = write_model(opened, number, target, recipe.model if recipe else None, license_id)
        if repo_id is not None:
            message = f"{opened.name} v{number} ({commit_id[:12]})"
            url = upload_model(target, repo_id, is_private=is_private, message=message)
    get_run_logger().info("version %d of %s: %s", number, chain, url or target)
    key = artifact_key(f"card-{opened.name}")
    create_markdown_artifact(card_body(card), key=key, description=f"Model card of v{number}")
    return Release(chain, number, commit_id, None if folder is None else str(target), url)
