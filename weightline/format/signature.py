"""Signatures of manifests and shortcuts: Ed25519 over an object's key and exact bytes. SPEC "Signatures".

They need `cryptography` (the extra `sign`), which is imported on the first signature or check.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from weightline.errors import InputError, SignatureError
from weightline.extras import requires
from weightline.format import keys
from weightline.format.manifest import Frozen, Sha256, parse_wire

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

SIGNATURE_FORMAT = "weightline-signature/1"

_PUBLIC_BLOCK = "-----END PUBLIC KEY-----"

#: Environment variable of writers: the file of a private key that signs every manifest and shortcut of this process.
SIGNING_KEY_VARIABLE = "WEIGHTLINE_SIGNING_KEY"

#: Environment variable of readers: a file of public keys, one of which must have signed every chain that is opened.
TRUSTED_KEYS_VARIABLE = "WEIGHTLINE_TRUSTED_KEYS"


class Signature(Frozen):
    """An Ed25519 signature over an object's key and sha256, stored beside a manifest or shortcut."""

    format: Literal["weightline/1"] = "weightline/1"
    features: Annotated[tuple[str, ...], Field(strict=False)] = ()
    subject: str
    """The key of the signed object."""
    sha256: Sha256
    """The sha256 of the signed object's bytes."""
    key_id: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
    signature: Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]

    @property
    def key(self) -> str:
        return keys.signature(self.subject, self.sha256, self.key_id)

    def to_bytes(self) -> bytes:
        """Returns deterministic UTF-8 JSON."""
        return self.model_dump_json(indent=1).encode()

    @classmethod
    def from_bytes(cls, raw: bytes) -> Signature:
        """Parses and validates. ManifestError names the broken rule."""
        return parse_wire(cls, raw, "signature")


@dataclass(frozen=True, slots=True)
class Signer:
    """Signs objects with a private key."""

    key_id: str
    _private: Ed25519PrivateKey

    def sign(self, subject: str, body: bytes) -> Signature:
        """Returns the signature of an object. It is deterministic: the same key and bytes give the same signature."""
        signature = self._private.sign(_message(subject, body)).hex()
        digest = hashlib.sha256(body).hexdigest()
        return Signature(subject=subject, sha256=digest, key_id=self.key_id, signature=signature)


@dataclass(frozen=True, slots=True)
class TrustedKeys:
    """Public keys. The signature of any one of them suffices."""

    _public: tuple[tuple[str, Ed25519PublicKey], ...]

    @property
    def key_ids(self) -> tuple[str, ...]:
        return tuple(key_id for key_id, _ in self._public)

    def check(self, signature: Signature, subject: str, body: bytes) -> None:
        """Raises SignatureError unless one of the keys made the signature over exactly this key and these bytes."""
        from cryptography.exceptions import InvalidSignature

        public = dict(self._public).get(signature.key_id)
        try:
            if public is None:
                raise InvalidSignature
            public.verify(bytes.fromhex(signature.signature), _message(subject, body))
        except InvalidSignature as error:
            raise SignatureError(
                f"the signature of {subject} by key {signature.key_id} is forged, or the object was altered",
                key=subject, key_id=signature.key_id,
            ) from error  # fmt: skip


def generate_key(path: Path) -> str:
    """Writes a new private key (mode 0600) and the public key beside it (`.pub`). Returns the key's id.

    InputError when one of the files exists: a key is never overwritten.
    """
    serialization, ed25519 = _cryptography()
    if not path.name:
        raise InputError(f"no key can be written to {path}: name a new file", path=str(path))
    private = ed25519.Ed25519PrivateKey.generate()
    private_pem = private.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    public_pem = private.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    public_path = path.with_name(f"{path.name}.pub")
    for target, pem, mode in ((path, private_pem, 0o600), (public_path, public_pem, 0o644)):
        try:
            descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        except OSError as error:
            raise InputError(f"no key can be written to {target}: {error.strerror}", path=str(target)) from error
        with os.fdopen(descriptor, "wb") as file:
            file.write(pem)
    return key_id_of(private.public_key())


def load_signer(path: Path) -> Signer:
    """Returns the signer of a PEM file. InputError when it has no private key, or when other users may read it."""
    serialization, ed25519 = _cryptography()
    pem = _read(path)
    if path.stat().st_mode & 0o077:
        raise InputError(f"other users can access the signing key {path}: run chmod 600 on it", path=str(path))
    try:
        private = serialization.load_pem_private_key(pem, password=None)
    except (ValueError, TypeError) as error:
        raise InputError(f"{path} holds no private key without a passphrase: {error}", path=str(path)) from error
    if not isinstance(private, ed25519.Ed25519PrivateKey):
        raise InputError(f"the key in {path} is not an Ed25519 key: make one with weightline keygen", path=str(path))
    return Signer(key_id_of(private.public_key()), private)


def load_trusted_keys(path: Path) -> TrustedKeys:
    """Returns the public keys in a PEM file, one or several. InputError for a file without any."""
    serialization, ed25519 = _cryptography()
    found = []
    for block in _blocks(_read(path)):
        try:
            public = serialization.load_pem_public_key(block)
        except ValueError as error:
            raise InputError(f"{path} holds text that is not a public key: {error}", path=str(path)) from error
        if not isinstance(public, ed25519.Ed25519PublicKey):
            raise InputError(f"a key in {path} is not an Ed25519 key: remove it", path=str(path))
        found.append((key_id_of(public), public))
    if not found:
        raise InputError(f"{path} holds no public key (PEM): give the .pub file of weightline keygen", path=str(path))
    return TrustedKeys(tuple(found))


def key_id_of(public: Ed25519PublicKey) -> str:
    """Returns 16 hex digits of the sha256 of the raw public key."""
    return hashlib.sha256(public.public_bytes_raw()).hexdigest()[:16]


def _message(subject: str, body: bytes) -> bytes:
    """Returns the signed message: the bytes with the object's key, in a format that no other message has."""
    return f"{SIGNATURE_FORMAT}\n{subject}\n".encode() + body


def _blocks(pem: bytes) -> Iterator[bytes]:
    *blocks, rest = pem.decode(errors="replace").split(_PUBLIC_BLOCK)
    yield from (f"{block.strip()}\n{_PUBLIC_BLOCK}\n".encode() for block in blocks)
    if rest.strip():
        yield rest.encode()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"no key can be read from {path}: {error.strerror}", path=str(path)) from error


def _cryptography() -> tuple[Any, Any]:
    with requires("sign"):
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    return serialization, ed25519


def signer_from_environment() -> Signer | None:
    """Returns the signer of this process; None without one. InputError when the named file cannot be used."""
    path = os.environ.get(SIGNING_KEY_VARIABLE)
    return load_signer(Path(path)) if path else None


def trusted_from_environment() -> TrustedKeys | None:
    """Returns the trusted keys of this process; None without any. InputError when the named file cannot be used."""
    path = os.environ.get(TRUSTED_KEYS_VARIABLE)
    return load_trusted_keys(Path(path)) if path else None
