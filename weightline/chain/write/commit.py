"""Commits a version by one create-only put of its header, after its signature. SPEC "Commit", "Signatures".

A signature is an object of its own, written before the object that it signs. So the commit stays one create-only put,
and a reader without trusted keys reads no signatures.
"""

from __future__ import annotations

import json
import secrets
import tempfile
from pathlib import Path

from weightline.chain.read.history import Chain
from weightline.chain.write.version import NewVersion, format_of_next, put_contents
from weightline.errors import (
    CommitConflictError,
    InputError,
    ManifestError,
    ObjectExistsError,
    StorageError,
)
from weightline.format import keys
from weightline.format.documents import MAX_HEADER_NBYTES, MAX_MANIFEST_NBYTES
from weightline.format.header import HeaderV2
from weightline.format.manifest import FORMAT_1, Header, Manifest
from weightline.format.shortcut import Shortcut
from weightline.format.signature import Signer, signer_from_environment
from weightline.store import Store


def new_commit_id() -> str:
    """Returns 128 random bits as hex, which identify this attempt to commit."""
    return secrets.token_hex(16)


def commit_manifest(chain: Chain, manifest: Manifest, *, written_as: str | None = None) -> Manifest:
    """Commits the version that a manifest describes, in the format in which the chain goes on: see `commit_version`.

    Returns the manifest as readers will find it.
    """
    header = commit_version(chain, NewVersion.of(manifest), written_as=written_as)
    return chain.manifest(header.version) if isinstance(header, HeaderV2) else manifest


def commit_version(chain: Chain, new: NewVersion, *, written_as: str | None = None) -> Header:
    """Commits the version by a create-only put of its header, and returns that. Its payloads must be uploaded already.

    What the header names besides payloads is put before it. The header is signed first if this process has a signing
    key. `written_as`: the format; None for that in which the chain goes on.

    Safe to repeat with the same version: an earlier attempt whose reply was lost is recognized by its commit_id.
    CommitConflictError names the winner when another writer committed the version. A crash before the put leaves
    orphans, which gc removes; a crash after it leaves a committed version.
    """
    version = new.facts.version
    base = _base_of(chain, version) if version > 0 else None
    header, body = _written(chain, new, base, written_as or format_of_next(chain, base))
    if len(body) > (MAX_HEADER_NBYTES if isinstance(header, HeaderV2) else MAX_MANIFEST_NBYTES):
        raise InputError(
            f"version {version} cannot be committed: its header of {len(body)} bytes exceeds what readers accept",
            version=version,
        )
    try:
        put_signed(chain.store, header.key, body)
    except ObjectExistsError as error:
        winner = chain.header(version)
        if winner.commit_id != header.commit_id:
            is_same_run = winner.run_id == header.run_id
            writer = "an earlier attempt of this run, or another writer" if is_same_run else "another writer"
            raise CommitConflictError(
                f"version {version} of {chain.url} was committed by {writer} (run {winner.run_id!r}, commit "
                f"{winner.commit_id}): start again from that version, or commit to a chain of your own",
                version=version,
                commit_id=header.commit_id,
                winner=winner.commit_id,
            ) from error
    chain.keep_header(header)
    _hint_tip(chain, version)
    return header


def _written(chain: Chain, new: NewVersion, base: Header | None, written_as: str) -> tuple[Header, bytes]:
    """Returns the header and the bytes of its object. InputError for facts that contradict each other."""
    try:
        if written_as == FORMAT_1:
            manifest = new.manifest()
            return manifest.header, manifest.to_bytes()
        header = put_contents(chain, new, base)
        return header, header.to_bytes()
    except (ValueError, ManifestError) as error:
        raise InputError(
            f"version {new.facts.version} cannot be committed: {error}", version=new.facts.version
        ) from error


def put_shortcut(chain: Chain, shortcut: Shortcut) -> Shortcut:
    """Puts a shortcut whose payloads are uploaded. Returns the stored one: this one, or an earlier writer's."""
    try:
        put_signed(chain.store, shortcut.key, shortcut.to_bytes())
    except ObjectExistsError:
        return Shortcut.from_bytes(chain.store.get(shortcut.key))
    return shortcut


def _base_of(chain: Chain, version: int) -> Header:
    """Returns the header of the version before. InputError when it does not exist, since versions are contiguous."""
    if chain.store.head(keys.commit(version - 1)) is None:
        raise InputError(
            f"version {version} cannot be committed: {chain.url} has no version {version - 1}", version=version
        )
    return chain.header(version - 1)


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
