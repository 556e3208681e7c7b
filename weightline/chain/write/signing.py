"""Signing what is put into a chain, and refusing what nobody vouches for. SPEC "Signatures".

A signature is an object of its own, written before the object that it signs: the commit stays one create-only put, and
a reader that asks for no signatures never sees one.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path

from weightline.errors import CorruptError, NotFoundError, SignatureError
from weightline.format import keys
from weightline.format.signature import Signature, Signer, TrustedKeys, load_signer, load_trusted_keys
from weightline.store import Store

#: Writers: the file of a private key. Every manifest and shortcut that this process writes is signed with it.
SIGNING_KEY_VARIABLE = "WEIGHTLINE_SIGNING_KEY"
#: Readers: a file of public keys. Every chain that this process opens must be signed by one of them.
TRUSTED_KEYS_VARIABLE = "WEIGHTLINE_TRUSTED_KEYS"


def signer_from_environment() -> Signer | None:
    """The key that this process signs with, if any. InputError when the file that is named cannot be used."""
    path = os.environ.get(SIGNING_KEY_VARIABLE)
    return load_signer(Path(path)) if path else None


def trusted_from_environment() -> TrustedKeys | None:
    """The keys that this process demands, if any. InputError when the file that is named cannot be used."""
    path = os.environ.get(TRUSTED_KEYS_VARIABLE)
    return load_trusted_keys(Path(path)) if path else None


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


def check_signed(store: Store, trusted: TrustedKeys, key: str, body: bytes) -> None:
    """SignatureError unless a trusted key signed exactly these bytes for this place. Reads one object a trusted key."""
    digest = hashlib.sha256(body).hexdigest()
    for key_id in trusted.key_ids:
        try:
            raw = store.get(keys.signature(key, digest, key_id))
        except NotFoundError:
            continue
        trusted.check(_parsed(raw, key), key, body)
        return
    raise SignatureError(
        f"{store.url}: {key} is not signed by a trusted key ({', '.join(trusted.key_ids)}). Whoever writes this chain "
        f"signs it by {SIGNING_KEY_VARIABLE}",
        key=key, key_ids=trusted.key_ids,
    )  # fmt: skip


def _parsed(raw: bytes, key: str) -> Signature:
    try:
        return Signature.from_bytes(raw)
    except CorruptError as error:
        raise SignatureError(f"the signature of {key} is none: {error}", key=key) from error
