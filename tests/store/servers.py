"""Object stores as processes on 127.0.0.1, for the length of a test session."""

from __future__ import annotations

import base64
import email.utils
import hashlib
import hmac
import http.client
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests import ROOT
from tests.waiting import PATIENCE_SECONDS, wait_until
from weightline.store.objects.clients import open_s3
from weightline.store.objects.store import ObjectStore, Patience

S3_ENVIRONMENT = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1"}
#: The account and key that every Azure emulator knows: they are published, and secret nowhere.
_AZURE_ACCOUNT = "devstoreaccount1"
#: `make test` puts it there where npm is.
_AZURITE = Path(__file__).parents[2] / ".venv" / "azurite" / "node_modules" / ".bin" / "azurite-blob"
_AZURE_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="


def azurite_command() -> str | None:
    """Where Microsoft's emulator stands, if it does: named, in the repository's environment, or on the path."""
    named = os.environ.get("WEIGHTLINE_TEST_AZURITE")
    return named or shutil.which(str(_AZURITE)) or shutil.which("azurite-blob")


@contextmanager
def moto_server() -> Iterator[int]:
    """The port of a fresh S3 server. Its process ends with the block."""
    port = _free_port()
    with _running([sys.executable, "-m", "tests.store.atomic_moto", str(port)], port):
        yield port


@contextmanager
def azurite_server() -> Iterator[int]:
    """The port of a fresh Azure Blob Storage emulator. Its process ends with the block."""
    command, port = azurite_command(), _free_port()
    assert command is not None
    options = ["--inMemoryPersistence", "--skipApiVersionCheck", "--disableTelemetry", "--blobHost", "127.0.0.1"]
    with _running([command, *options, "--blobPort", str(port)], port):
        yield port


def create_s3_bucket(port: int, name: str) -> None:
    _put(port, f"/{name}", {}, 200)


def create_azure_container(port: int, name: str) -> None:
    headers = {"x-ms-date": email.utils.formatdate(usegmt=True), "x-ms-version": "2021-08-06"}
    signed = "\n".join(
        ["PUT", *[""] * 11, *(f"{k}:{v}" for k, v in headers.items()), f"/{_AZURE_ACCOUNT}/{_AZURE_ACCOUNT}/{name}",
         "restype:container"]
    )  # fmt: skip
    digest = hmac.new(base64.b64decode(_AZURE_KEY), signed.encode(), hashlib.sha256).digest()
    headers["Authorization"] = f"SharedKey {_AZURE_ACCOUNT}:{base64.b64encode(digest).decode()}"
    _put(port, f"/{_AZURE_ACCOUNT}/{name}?restype=container", headers, 201)


def azure_environment(port: int) -> dict[str, str]:
    return {
        "AZURE_STORAGE_ACCOUNT_NAME": _AZURE_ACCOUNT,
        "AZURE_STORAGE_ACCOUNT_KEY": _AZURE_KEY,
        "AZURE_STORAGE_ENDPOINT": f"http://127.0.0.1:{port}/{_AZURE_ACCOUNT}",
    }


def _put(port: int, path: str, headers: dict[str, str], expected: int) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_SECONDS)
    connection.request("PUT", path, headers=headers)
    reply = connection.getresponse()
    assert reply.status == expected, reply.read()
    connection.close()


@contextmanager
def _running(argv: list[str], port: int) -> Iterator[None]:
    environment = os.environ | {"PYTHONWARNINGS": "ignore", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment) as process:
        try:
            wait_until(lambda: process.poll() is not None or _answers(port))
            assert process.poll() is None, "the server ended at once"
            yield
        finally:
            process.terminate()


def _answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def open_patiently(url: str, patience: Patience) -> ObjectStore:
    """The bucket that an `s3://` URL names, without our repeating around it, and with this patience of the client."""
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    return open_s3(url, bucket, prefix, patience=patience)
