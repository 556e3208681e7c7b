"""Commits a version: the one create-only put that makes it exist, after its signature. SPEC "Commit", "Signatures".

A signature is an object of its own, written before the object that it signs, so the commit stays one create-only put
and a reader that asks for no signatures never reads one.
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
from weightline.format.manifest import Manifest
from weightline.format.shortcut import Shortcut
from weightline.format.signature import Signer, signer_from_environment
from weightline.store import Store


def new_commit_id() -> str:
    """Returns 128 random bits as hex, which tell this attempt to commit from every other."""
    return secrets.token_hex(16)


def commit_manifest(chain: Chain, manifest: Manifest) -> None:
    """Commit the version by a create-only put; its payloads must be up already.

    Safe to repeat with the same manifest: an earlier attempt whose reply was lost is recognised by its commit_id.
    Signed first, where this process has a key to sign with.
    CommitConflictError names the winner when another writer holds the version. A crash before the put leaves orphaned
    payloads, which gc removes; a crash after it leaves a committed version.
    """
    if manifest.version > 0:
        _require_base(chain, manifest)
    try:
        put_signed(chain.store, manifest.key, manifest.to_bytes())
    except ObjectExistsError as error:
        winner = chain.manifest(manifest.version)
        if winner.commit_id != manifest.commit_id:
            is_same_run = winner.run_id == manifest.run_id
            who = "an earlier attempt of this run, or another writer" if is_same_run else "another writer"
            raise CommitConflictError(
                f"version {manifest.version} of {chain.url} was committed by {who} (run {winner.run_id!r}, "
                f"commit {winner.commit_id}): start again from that version, or commit to a chain of your own",
                version=manifest.version,
                commit_id=manifest.commit_id,
                winner=winner.commit_id,
            ) from error
    _hint_tip(chain, manifest.version)


def put_shortcut(chain: Chain, shortcut: Shortcut) -> Shortcut:
    """Put a shortcut whose payloads are up, and return the one that stands: this one, or an earlier writer's."""
    try:
        put_signed(chain.store, shortcut.key, shortcut.to_bytes())
    except ObjectExistsError:
        return Shortcut.from_bytes(chain.store.get(shortcut.key))
    return shortcut


def _require_base(chain: Chain, manifest: Manifest) -> None:
    """Versions are contiguous: refuse one whose predecessor does not exist."""
    if chain.store.head(keys.commit(manifest.version - 1)) is None:
        raise InputError(
            f"version {manifest.version} cannot be committed: {chain.url} has no version {manifest.version - 1}",
            version=manifest.version,
        )


def _hint_tip(chain: Chain, version: int) -> None:
    """Shorten the next reader's listing. Losing the hint loses nothing, so a failing store is not an error here."""
    try:
        chain.store.put(keys.TIP_HINT, json.dumps({"version": version}).encode())
    except StorageError:
        return


def check_signing_key() -> None:
    """InputError, before any work, when this process is to sign and cannot. Safe to repeat."""
    signer_from_environment()


def put_signed(store: Store, key: str, body: bytes) -> None:
    """`put_if_absent`, and before it the signature of this process's key, if it has one.

    Safe to repeat with the same bytes. A crash between the two leaves a signature of nothing, which gc collects.
    """
    signer = signer_from_environment()
    if signer is not None:
        _put_signature(store, signer, key, body)
    store.put_if_absent(key, body)


def sign_existing(store: Store, signer: Signer) -> int:
    """Vouch for every manifest and shortcut that the bucket holds now: what makes an unsigned chain a signed one.

    Returns how many signatures were added. Safe to repeat; a crash leaves some objects unsigned. It says nothing of
    whether they are right: verify the chain first.
    """
    found = [info.key for prefix in (keys.COMMITS, keys.SHORTCUTS) for info in store.list(prefix)]
    return sum(_put_signature(store, signer, key, store.get(key)) for key in found)


def _put_signature(store: Store, signer: Signer, key: str, body: bytes) -> bool:
    """False when it was there: the same key over the same bytes is the same signature. Durable when it returns."""
    signature = signer.sign(key, body)
    if store.head(signature.key) is not None:
        return False
    # Not create-only, which may be slow: the key names what is signed and by whom, and ed25519 signs that one way, so
    # writers that race write the same bytes. As a file: `put` is for hints, and need not have settled when it returns.
    with tempfile.TemporaryDirectory(prefix="weightline-") as folder:
        path = Path(folder) / "signature.json"
        path.write_bytes(signature.to_bytes())
        store.put_file(signature.key, path)
    return True
