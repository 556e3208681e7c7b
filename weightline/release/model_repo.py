"""Publishes a version as a model: writes its checkpoint folder with a model card, and uploads the folder to the Hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from weightline.chain import Chain
from weightline.chain.files.checkpoint import MARKER, write_checkpoint
from weightline.errors import InputError, StorageError, TransientStorageError
from weightline.files import write_atomically
from weightline.release.model_card import CARD, card_facts, model_card
from weightline.stages.recipe import ModelConfig


@dataclass(frozen=True, slots=True)
class Release:
    """A published version, with its folder and its repository."""

    chain: str
    version: int
    commit_id: str
    folder: str | None
    repo_url: str | None


def write_model(chain: Chain, version: int, folder: Path, start: ModelConfig | None, license_id: str | None) -> str:
    """Writes the version's checkpoint, with digests checked, and its model card. Returns the card. Safe to repeat."""
    write_checkpoint(chain, version, folder)
    card = model_card(card_facts(chain, version, start, license_id))
    write_atomically(folder / CARD, card)
    return card


def upload_model(folder: Path, repo_id: str, *, is_private: bool, message: str) -> str:
    """Creates the repository if it does not exist, and commits the folder's files to it. Returns its URL.

    Takes the token from HF_TOKEN or the stored login, and the server from HF_ENDPOINT. Safe to repeat: files that the
    repository has already are not uploaded again. InputError for a name that the Hub refuses; StorageError with a
    remedy when it refuses the write; TransientStorageError when it does not answer.
    """
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    api = HfApi()
    try:
        url = api.create_repo(repo_id, private=is_private, exist_ok=True, repo_type="model")
        api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message, ignore_patterns=[MARKER, ".*"])
    except HFValidationError as error:
        raise InputError(f"repo_id: {error}", field="repo_id") from error
    except HfHubHTTPError as error:
        raise _explained(error, repo_id) from error
    except httpx.TransportError as error:
        raise TransientStorageError(f"the Hub did not answer for {repo_id}: {error}", url=repo_id) from error
    return str(url)


def _explained(error: Exception, repo_id: str) -> StorageError:
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    if status is None or status == 429 or status >= 500:
        return TransientStorageError(f"the Hub failed for {repo_id}: {error}", url=repo_id)
    if status in (401, 403):
        remedy = "set HF_TOKEN to a token with write permission for it"
        return StorageError(f"the Hub refuses {repo_id} ({status}): {remedy}", url=repo_id)
    return StorageError(f"the Hub refuses {repo_id}: {error}", url=repo_id)
