"""Buckets and replicas as processes of their own: a folder, the emulators of S3 and of the Hub, both engines."""

from __future__ import annotations

import asyncio
import ctypes
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from tests import ROOT
from tests.store import servers
from weightline.rollouts.client import ReplicaClient, Wanted
from weightline.rollouts.sampling import Sampling
from weightline.serving.http import client
from weightline.serving.http.server import ADDRESS_FILE
from weightline.serving.replica.status import RefreshFacts

_START_SECONDS = 600.0
_WAIT_SECONDS = 600.0
#: As tests/vllm starts it: little memory for keys and values, no compilation.
_VLLM_OPTIONS = (
    "--enforce-eager", "--max-model-len", "256", "--max-num-seqs", "8", "--kv-cache-memory-bytes", str(2**26),
)  # fmt: skip
_VLLM_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "VLLM_NO_USAGE_STATS": "1"}
_PROMPT = tuple(b"12+34=")


@contextmanager
def file_bucket(folder: Path) -> Iterator[str]:
    """Yields the URL of a bucket that is a folder."""
    yield (folder / "bucket").as_uri()


@contextmanager
def s3_bucket(_: Path) -> Iterator[str]:
    """Yields the URL of a bucket of moto, and sets the clients' environment to it."""
    with servers.moto_server() as port:
        os.environ |= servers.S3_ENVIRONMENT | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}
        servers.create_s3_bucket(port, "bench")
        yield "s3://bench"


@contextmanager
def hub_bucket(folder: Path, visible_after_seconds: float = 2.5) -> Iterator[str]:
    """Yields the URL of a bucket of the Hub's emulator, and sets the clients' environment to it.

    Listings and file infos show what is written `visible_after_seconds` later, as the Hub's do.
    """
    lag = str(visible_after_seconds)
    argv = [sys.executable, "-m", "tests.hub_emulator", "--root", str(folder / "hub")]
    argv += ["--list-lag-seconds", lag, "--info-lag-seconds", lag]
    with subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, text=True, preexec_fn=end_with_parent) as server:
        assert server.stdout is not None
        os.environ |= {
            "HF_ENDPOINT": server.stdout.readline().strip(), "HF_TOKEN": "hf_bench", "HF_HOME": str(folder / "home"),
            "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_XET_TELEMETRY_ENABLED": "0",
        }  # fmt: skip
        try:
            yield "hf://buckets/user/bench"
        finally:
            server.terminate()


BUCKETS = {"file": file_bucket, "s3": s3_bucket, "hub": hub_bucket}


def vllm_python() -> Path | None:
    """Returns a Python that has vLLM: this one, or that of the environment that `make test-vllm` makes."""
    if importlib.util.find_spec("vllm") is not None:
        return Path(sys.executable)
    made = ROOT / ".venv-vllm" / "bin" / "python"
    return made if made.exists() else None


@dataclass(frozen=True, slots=True)
class FirstAnswer:
    """When a replica served a version, and when its first answer had come. `facts` are those of its move to it."""

    served: float
    answered: float
    facts: RefreshFacts


@dataclass(frozen=True, slots=True)
class RunningReplica:
    """A replica that serves a version."""

    url: str

    def first_answer(self, version: int) -> FirstAnswer:
        """Asks for a token of the version, which may not exist yet, and waits for the answer."""
        served, answered = asyncio.run(self._wait_for(version))
        return FirstAnswer(served, answered, self._move_to(version))

    def _move_to(self, version: int) -> RefreshFacts:
        """Returns the facts of the move to a version, which may have ended a moment after its first answer."""
        deadline = time.monotonic() + _WAIT_SECONDS
        while time.monotonic() < deadline:
            facts = client.status(self.url).last_refresh
            if facts is not None and facts.version == version:
                return facts
            time.sleep(0.05)
        raise SystemExit(f"the status of {self.url} does not name its move to version {version}")

    async def _wait_for(self, version: int) -> tuple[float, float]:
        replica = ReplicaClient(self.url, 2 * _WAIT_SECONDS)
        try:
            served, answered = await asyncio.gather(self._served(replica, version), self._answered(replica, version))
        finally:
            await replica.close()
        return served, answered

    async def _served(self, replica: ReplicaClient, version: int) -> float:
        found = await replica.wait_for(version, _WAIT_SECONDS)
        if found.version is None or found.version < version:
            raise SystemExit(f"version {version} was not served in {_WAIT_SECONDS:g} s: {found.last_error}")
        return time.monotonic()

    async def _answered(self, replica: ReplicaClient, version: int) -> float:
        offer, sampling = await replica.status(), Sampling(max_tokens=1, temperature=0.0)
        await replica.generate(offer, [_PROMPT], [0], sampling, Wanted(min_version=version), _WAIT_SECONDS)
        return time.monotonic()


@contextmanager
def running_replica(
    engine: str, python: Path, chain_url: str, state_dir: Path, follow_seconds: float
) -> Iterator[RunningReplica]:
    """Starts a replica as a person does, and yields it once it serves the newest version."""
    argv = [str(python), "-m", "weightline", "serve", *(("vllm", "bench") if engine == "vllm" else (engine,))]
    argv += ["--follow", chain_url, "--state-dir", str(state_dir), "--port", "0", "--every", f"{follow_seconds:g}"]
    argv += _VLLM_OPTIONS if engine == "vllm" else ()
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | (_VLLM_ENVIRONMENT if engine == "vllm" else {})
    state_dir.mkdir(parents=True)
    log = state_dir / "log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            argv, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            preexec_fn=end_with_parent,
        )  # fmt: skip
    try:
        yield RunningReplica(_wait_until_serving(process, state_dir, log))
    finally:
        process.terminate()
        try:
            process.wait(60)
        finally:
            _kill_rest(process)


def _wait_until_serving(process: subprocess.Popen[bytes], state_dir: Path, log: Path) -> str:
    """Returns the URL of a replica once it serves a version."""
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        url = _url_in(state_dir)
        if url is not None and _serves(url):
            return url
        time.sleep(0.3)
    raise SystemExit(f"the replica does not serve:\n{log.read_text(errors='replace')[-4000:]}")


def _url_in(state_dir: Path) -> str | None:
    path = state_dir / ADDRESS_FILE
    if not path.exists():
        return None
    address: Mapping[str, str] = json.loads(path.read_text())
    return address["url"]


def _serves(url: str) -> bool:
    try:
        answer = httpx.get(f"{url}/weightline/version", timeout=5, trust_env=False)
    except httpx.HTTPError:
        return False
    return answer.is_success and answer.json()["version"] is not None


def _kill_rest(process: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def end_with_parent() -> None:
    """In the child: SIGTERM when this process is gone, however it went. Linux only; elsewhere nothing."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(1, signal.SIGTERM)
