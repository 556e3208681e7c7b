"""weightline keygen FILE: a key to sign versions with, and its public half for those who check them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from weightline.cli.output import Json, emit
from weightline.format.signature import SIGNING_KEY_VARIABLE, TRUSTED_KEYS_VARIABLE, generate_key


def run(
    key: Annotated[Path, typer.Argument(metavar="FILE", help="New file for the private key; FILE.pub is the other.")],
    as_json: Json = False,
) -> None:
    """Make an ed25519 key pair for signing manifests and shortcuts."""
    key_id = generate_key(key)
    public = key.with_name(f"{key.name}.pub")
    emit(
        {"key_id": key_id, "private": str(key), "public": str(public)},
        [
            f"key {key_id}",
            f"writers:  {SIGNING_KEY_VARIABLE}={key}",
            f"readers:  {TRUSTED_KEYS_VARIABLE}={public}",
        ],
        as_json=as_json,
    )
