"""Commits a version by one create-only put of its manifest, after its signature. SPEC "Commit", "Signatures".

A signature is an object of its own, written before the object that it signs. So the commit stays one create-only put,
and a reader without trusted keys reads no signatures.
"""

from __future__ import annotations

import json
import secrets
import tempfile
from pathlib import Path

from weightline.chain.read.history import Chain
from weightline.errors import (
    CommitConflictError,
    InputError,
    ObjectExistsError,
    StorageError,
)
from weightline.format import keys
from weightline.format.documents import MAX_MANIFEST_NBYTES
from weightline.format.manifest import Manifest
from weightline.format.shortcut import Shortcut
from weightline.format.signature import Signer, signer_from_environment
from weightline.store import Store


def new_commit_id() -> str:
    """Returns 128 random bits as hex, which identify this attempt to commit."""
    return secrets.token_hex(16)


def commit_manifest(chain: Chain, manifest: Manifest) -> None:
    """Commits the version by a create-only put. Its payloads must be uploaded already.

    The manifest is signed first if this process has a signing key. Safe to repeat with the same manifest: an earlier
    attempt whose reply was lost is recognized by its commit_id. CommitConflictError names the winner when another
    writer committed the version. A crash before the put leaves orphaned payloads, which gc removes; a crash after it
    leaves a committed version.
    """
    body = manifest.to_bytes()
    if len(body) > MAX_MANIFEST_NBYTES:
        raise InputError(
            f"version {manifest.version} cannot be committed: its manifest of {len(body)} bytes exceeds the "
            f"{MAX_MANIFEST_NBYTES} that readers accept",
            version=manifest.version,
        )
    if manifest.version > 0:
        _require_base(chain, manifest)
    try:
        put_signed(chain.store, manifest.key, body)
    except ObjectExistsError as error:
        winner = chain.manifest(manifest.version)
        if winner.commit_id != manifest.commit_id:
            is_same_run = winner.run_id == manifest.run_id
            writer = "an earlier attempt of this run, or another writer" if is_same_run else "another writer"
            raise CommitConflictError(
                f"version {manifest.version} of {chain.url} was committed by {writer} (run {winner.run_id!r}, "
                f"commit {winner.commit_id}): start again from that version, or commit to a chain of your own",
                version=manifest.version,
                commit_id=manifest.commit_id,
                winner=winner.commit_id,
            ) from error
    _hint_tip(chain, manifest.version)


def put_shortcut(chain: Chain, shortcut: Shortcut) -> Shortcut:
    """Puts a shortcut whose payloads are uploaded. Returns the stored one: this one, or an earlier writer's."""
    try:
        put_signed(chain.store, shortcut.key, shortcut.to_bytes())
    except ObjectExistsError:
        return Shortcut.from_bytes(chain.store.get(shortcut.key))
    return shortcut


def _require_base(chain: Chain, manifest: Manifest) -> None:
    """Raises InputError for a version whose predecessor does not exist, since versions are contiguous."""
    if chain.store.head(keys.commit(manifest.version - 1)) is None:
        raise InputError(
            f"version {manifest.version} cannot be committed: {chain.url} has no version {manifest.version - 1}",
            version=manifest.version,
        )


def _hint_tip(chain: Chain, version: int) -> None:
    """Writes the hint that shortens the next reader's listing. Best effort: readers work without the hint."""
    try:
        chain.store.put(keys.TIP_HINT, json.dumps({"version": version}).encode())
    except StorageError:
        return


def check_signing_key() -> None:
    """Raises InputError, before any work, when the signing key of this process cannot be used. Safe to repeat."""
    signer_from_environment()


def put_signed(store: Store, key: str, body: bytes) -> None:
    """Writes the signature of an object if this process has a signing key, then puts the object create-only.

    Safe to repeat with the same bytes. A crash between the two leaves a signature without its object, which gc
    collects.
    """
    signer = signer_from_environment()
    if signer is not None:
        _put_signature(store, signer, key, body)
    store.put_if_absent(key, body)


def sign_existing(store: Store, signer: Signer) -> int:
    """Signs every manifest and shortcut in the bucket, which turns an unsigned chain into a signed one.

    Returns the number of added signatures. Safe to repeat; a crash leaves some objects unsigned. It does not check the
    objects: verify the chain first.
    """
    found = [info.key for prefix in (keys.COMMITS, keys.SHORTCUTS) for info in store.list(prefix)]
    return sum(_put_signature(store, signer, key, store.get(key)) for key in found)


def _put_signature(store: Store, signer: Signer, key: str, body: bytes) -> bool:
    """Writes the signature unless it exists; returns whether it was written. Durable when this returns."""
    signature = signer.sign(key, body)
    if store.head(signature.key) is not None:
        return False
    # The put is not create-only, which may be slow: the key names the signed bytes and the signing key, and Ed25519 is
    # deterministic, so racing writers write the same bytes. `put` is for hints and need not be durable when it returns,
    # so the signature is uploaded as a file.
    with tempfile.TemporaryDirectory(prefix="weightline-") as folder:
        path = Path(folder) / "signature.json"
        path.write_bytes(signature.to_bytes())
        store.put_file(signature.key, path)
    return True
