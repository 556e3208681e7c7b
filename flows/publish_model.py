"""Publishes one version as a model: a checkpoint folder, a repository on the Hub, or both, with a model card."""

from __future__ import annotations

from typing import Annotated

from prefect import flow
from prefect.runtime import flow_run

from weightline.chain.read.history import chain_name
from weightline.flows.forms import ChainUrl, VersionName, label
from weightline.release.model_repo import Release
from weightline.runs.checks import check_release
from weightline.tasks.release import release


def _name_run() -> str:
    return f"publish {flow_run.parameters['version']} of {chain_name(flow_run.parameters['chain'])}"


@flow(name="publish-model", flow_run_name=_name_run, persist_result=False)
def publish_model(
    chain: ChainUrl,
    version: VersionName = "tip",
    folder: Annotated[str | None, label("Folder", min_length=1)] = None,
    repo_id: Annotated[str | None, label("Hub repository", pattern=r"^[\w.-]+/[\w.-]+$")] = None,
    is_private: Annotated[bool, label("Private repository")] = True,
    license_id: Annotated[str | None, label("License", pattern=r"^[a-z0-9][a-z0-9.-]*$")] = None,
) -> Release:
    """Check every digest of a version and write it with a model card that states chain, runs, stages and evaluations.

    Args:
        chain: URL of the bucket and chain.
        version: A number, `tip`, or the name of a tag.
        folder: New folder for the checkpoint. Empty: none is kept.
        repo_id: owner/name on the Hub; created if it does not exist. Needs HF_TOKEN. Empty: nothing is uploaded.
        is_private: Make a repository that this run creates private.
        license_id: License on the card, by its name on the Hub: apache-2.0, mit, ... Empty: none is stated.
    """
    check_release(chain, version, folder, repo_id)
    return release(chain, version, folder, repo_id, is_private, license_id)
