"""The one write that makes a version exist. SPEC "Commit"."""

from __future__ import annotations

import json
import secrets
from datetime import UTC, datetime
from typing import Any

from weightline.chain.read.history import Chain
from weightline.chain.write.signing import put_signed
from weightline.errors import CommitConflictError, InputError, ObjectExistsError, StorageError
from weightline.format import keys
from weightline.format.manifest import Manifest


def new_commit_id() -> str:
    """128 random bits: tells this attempt to commit from every other."""
    return secrets.token_hex(16)


def utc_now() -> str:
    """This host's clock, UTC, ISO 8601 to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


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


def committed_facts(manifest: Manifest) -> dict[str, Any]:
    """What is told of a commit: in its event, and as the result of the step that made it. Pure."""
    told = {
        "version", "commit_id", "kind", "stage", "run_id", "global_step", "is_milestone",
        "num_changed", "num_elements", "payload_nbytes", "full_nbytes",
    }  # fmt: skip
    return manifest.model_dump(include=told)


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
