"""Opens buckets of S3 and S3-compatible services, of Google Cloud Storage and of Azure."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from obstore.exceptions import BaseError
from obstore.store import AzureStore, GCSStore, S3Store

from weightline.errors import InputError
from weightline.files import user_path
from weightline.store.objects.store import DEFAULT_PATIENCE, ObjectStore, Patience

if TYPE_CHECKING:
    from obstore.store import ClientConfig, RetryConfig

    from weightline.store.objects.store import Connect


def open_s3(
    url: str,
    bucket: str,
    prefix: str,
    *,
    endpoint: str | None = None,
    access_key_id: str | None = None,
    secret_access_key: str | None = None,
    region: str | None = None,
    patience: Patience = DEFAULT_PATIENCE,
) -> ObjectStore:
    """Opens an S3-compatible bucket. Settings that are not given come from the environment.

    Given keys replace all other credentials. An endpoint may have a path, as in https://host/path/namespace; the
    bucket's name is appended to it. An `http://` endpoint is used without TLS. InputError for a setting that the client
    rejects. Reads and writes nothing.
    """
    endpoint = endpoint or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    config: dict[str, Any] = {}
    if endpoint:
        config |= {"endpoint": endpoint, "aws_endpoint_url_s3": endpoint}
    if access_key_id and secret_access_key:
        keys = {"access_key_id": access_key_id, "secret_access_key": secret_access_key, "expires_at": None}
        config["credential_provider"] = lambda: keys
    else:
        config |= _aws_profile()
    if region:
        config["region"] = region

    def connect(options: ClientConfig, retry: RetryConfig, *, in_batches: bool) -> S3Store:
        return S3Store(bucket, client_options=options, retry_config=retry, disable_bulk_delete=not in_batches, **config)

    return _open(url, prefix, endpoint.startswith("http://"), connect, patience)


def open_gs(url: str, bucket: str, prefix: str) -> ObjectStore:
    """Opens a Google Cloud Storage bucket. Credentials come from the environment or the application defaults."""
    is_plain = os.environ.get("GOOGLE_BASE_URL", "").startswith("http://")
    return _open(url, prefix, is_plain, lambda options, retry, in_batches: GCSStore(
        bucket, client_options=options, retry_config=retry
    ))  # fmt: skip


def open_az(url: str, container: str, prefix: str) -> ObjectStore:
    """Opens an Azure Blob Storage container.

    Account and credentials come from the environment, a managed identity or `az login`.
    """
    is_emulator = os.environ.get("AZURE_STORAGE_USE_EMULATOR", "").lower() in ("1", "true")
    is_plain = os.environ.get("AZURE_STORAGE_ENDPOINT", "").startswith("http://")
    return _open(url, prefix, is_emulator or is_plain, lambda options, retry, in_batches: AzureStore(
        container, client_options=options, retry_config=retry
    ))  # fmt: skip


def _open(
    url: str, prefix: str, is_plain: bool, connect: Connect, patience: Patience = DEFAULT_PATIENCE
) -> ObjectStore:
    """Opens a store. `is_plain`: allow http without TLS. InputError for settings that the client rejects."""

    def connect_allowed(options: ClientConfig, retry: RetryConfig, *, in_batches: bool) -> Any:
        return connect(options | {"allow_http": is_plain}, retry, in_batches=in_batches)

    try:
        return ObjectStore(url, prefix, connect_allowed, patience)
    except (BaseError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"{url}: {reason}. docs/buckets.md lists the settings of each store", url=url) from error


def _aws_profile() -> dict[str, Any]:
    """Returns the credentials of ~/.aws, read by boto3, when AWS_PROFILE is set or the environment has no others.

    obstore itself reads the environment and instance roles only.
    """
    profile = os.environ.get("AWS_PROFILE")
    files = (os.environ.get("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials"), "~/.aws/config")
    has_files = any(user_path(name).exists() for name in files)
    has_others = "AWS_ACCESS_KEY_ID" in os.environ or "AWS_SKIP_SIGNATURE" in os.environ
    if profile is None and (has_others or not has_files):
        return {}
    try:
        from obstore.auth.boto3 import Boto3CredentialProvider
    except ImportError as error:
        if profile is None:
            return {}
        raise InputError("AWS_PROFILE is set, and reading profiles needs boto3: pip install boto3") from error
    from botocore.exceptions import BotoCoreError

    try:
        return {"credential_provider": Boto3CredentialProvider()}
    except (BotoCoreError, ValueError) as error:
        if profile is None:
            return {}
        raise InputError(f"AWS_PROFILE={profile}: {error}", profile=profile) from error
