"""The emulator's own way into its content store, for doors that carry plain bytes: the real hf_xet, over HTTP."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

import hf_xet

from tests.hub_emulator.content import EMPTY_FILE
from tests.hub_emulator.emulator import HubEmulator

_EXPIRES = 2**40


@cache
def _session() -> hf_xet.XetSession:
    return hf_xet.XetSession()


def write_content(emulator: HubEmulator, body: bytes) -> str:
    """Store bytes; their xet hash."""
    if not body:
        return EMPTY_FILE
    with _session().new_upload_commit(endpoint=emulator.url, token="door", token_expiry_unix_secs=_EXPIRES) as commit:
        upload = commit.start_upload_bytes(body, sha256=hf_xet.SKIP_SHA256)
    return str(upload.result().xet_info.hash)


def read_content(emulator: HubEmulator, xet_hash: str, nbytes: int) -> bytes:
    """The bytes of a file."""
    if nbytes == 0:
        return b""
    with tempfile.TemporaryDirectory(prefix="hub-emulator-") as folder:
        path = Path(folder) / "content"
        with _session().new_file_download_group(
            endpoint=emulator.url, token="door", token_expiry_unix_secs=_EXPIRES
        ) as group:
            group.start_download_file(hf_xet.XetFileInfo(xet_hash, nbytes), str(path))
        return path.read_bytes()
