"""The token that a refresh needs: from WEIGHTLINE_TOKEN, or from a file of mode 0600 in the state folder."""

from __future__ import annotations

import hmac
import ipaddress
import os
import secrets
from collections.abc import Callable
from pathlib import Path

from weightline.errors import InputError

TOKEN_VARIABLE = "WEIGHTLINE_TOKEN"  # noqa: S105 - the name of a variable
TOKEN_FILE = "token"  # noqa: S105 - the name of a file


def load_token(state_dir: Path) -> str:
    """Returns the environment's token, or the state folder's, which is created at first use. Safe to repeat.

    InputError for an empty token, and for a file that group or others have any access to.
    """
    given = os.environ.get(TOKEN_VARIABLE)
    if given is not None:
        return _checked(given, f"the environment variable {TOKEN_VARIABLE}")
    path = state_dir / TOKEN_FILE
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return read_token(path)
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_urlsafe(32))
    return read_token(path)


def read_token(path: Path) -> str:
    """Returns the token in a file. InputError when there is none, or when group or others have any access to it."""
    try:
        mode = path.stat().st_mode
        token = path.read_text()
    except OSError as error:
        raise InputError(f"no token can be read from {path}: {error.strerror}", field="token") from error
    if mode & 0o077:
        raise InputError(f"other users can access {path} (mode {mode & 0o777:o}): run chmod 600 on it", field="token")
    return _checked(token, str(path))


def has_given_token(state_dir: Path) -> bool:
    """Returns whether an operator chose the token, so that the replica may listen where other machines reach it."""
    return os.environ.get(TOKEN_VARIABLE) is not None or (state_dir / TOKEN_FILE).exists()


def is_loopback(host: str) -> bool:
    """Returns whether only this machine can reach the address. Of names, only localhost counts."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def is_authorized(
    header: str | None, token: str, is_same: Callable[[bytes, bytes], bool] = hmac.compare_digest
) -> bool:
    """Returns whether an Authorization header carries the token. Compares in constant time."""
    scheme, _, given = (header or "").partition(" ")
    is_equal = is_same(given.strip().encode(), token.encode())
    return is_equal and scheme.lower() == "bearer"


def _checked(token: str, source: str) -> str:
    if not token.strip() or not token.isascii():
        raise InputError(f"{source} holds no token: set one of ASCII characters", field="token")
    return token.strip()
