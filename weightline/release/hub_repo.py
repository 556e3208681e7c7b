"""A folder as a model repository on the Hugging Face Hub. Free of Prefect; the client is imported when it is needed."""

from __future__ import annotations

from pathlib import Path

from weightline.chain.files.checkpoint import MARKER
from weightline.errors import InputError, StorageError, TransientStorageError


def upload_model(folder: Path, repo_id: str, *, is_private: bool, message: str) -> str:
    """Make the repository if it is not there, and commit the folder's files to it. Returns its URL.

    Token from HF_TOKEN or the stored login, server from HF_ENDPOINT. Safe to repeat: files that are there already are
    not uploaded again. InputError for a name that the Hub refuses, StorageError with a remedy when it says no,
    TransientStorageError when it was away.
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
        raise TransientStorageError(f"the Hub gave no answer for {repo_id}: {error}", url=repo_id) from error
    return str(url)


def _explained(error: Exception, repo_id: str) -> StorageError:
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    if status is None or status == 429 or status >= 500:
        return TransientStorageError(f"the Hub failed for {repo_id}: {error}", url=repo_id)
    if status in (401, 403):
        remedy = "set HF_TOKEN to a token that may write there"
        return StorageError(f"the Hub refuses {repo_id} ({status}): {remedy}", url=repo_id)
    return StorageError(f"the Hub refuses {repo_id}: {error}", url=repo_id)
