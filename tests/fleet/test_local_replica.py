"""Finding the inference server of a chain, and starting it where a local stack has none yet."""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.serving.model_chains import make_chain
from tests.waiting import wait_until
from weightline.chain import Chain, open_chain
from weightline.chain.read.leases import Lease, write_lease
from weightline.errors import ApplyError, InputError, LaunchError
from weightline.fleet.local_replica import REPLICAS_DIR_VARIABLE, end_replicas, ensure_replica
from weightline.fleet.members import SERVING_URL_VARIABLE, Fleet, ReachableReplica, find_fleet
from weightline.launch.processes import WORKER_PID_VARIABLE
from weightline.launch.replica import VLLM_PYTHON_VARIABLE, find_vllm_python, replica_argv, require_vllm_python
from weightline.serving.engines.vllm.serve import check_arguments
from weightline.serving.http import client
from weightline.serving.http.auth import TOKEN_VARIABLE
from weightline.serving.http.hosts import REPLICA_HOSTS_VARIABLE, may_receive_token


def test_without_a_stack_or_a_url_the_remedy_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SERVING_URL_VARIABLE, raising=False)
    monkeypatch.delenv(REPLICAS_DIR_VARIABLE, raising=False)
    with pytest.raises(InputError, match="WEIGHTLINE_SERVING_URL"):
        find_fleet(open_chain("memory://nobody"))


def test_a_replica_that_is_away_is_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SERVING_URL_VARIABLE, "http://127.0.0.1:9")
    with pytest.raises(ApplyError, match="check that it runs"):
        find_fleet(open_chain("memory://nobody"))


def test_replicas_that_follow_by_themselves_are_known_and_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SERVING_URL_VARIABLE, raising=False)
    monkeypatch.delenv(REPLICAS_DIR_VARIABLE, raising=False)
    monkeypatch.setenv(TOKEN_VARIABLE, "s3cret")
    chain = open_chain("memory://followed")
    write_lease(chain, _lease("http://127.0.0.1:9", follows="serving"))
    assert find_fleet(chain) == Fleet((), ("r",))


@pytest.mark.parametrize(
    ("url", "hosts", "may"),
    [
        ("http://127.0.0.1:8000", None, True),
        ("http://localhost:8000", None, True),
        ("http://[::1]:8000", None, True),
        ("http://10.0.0.7:8000", None, False),
        ("http://127.0.0.1.evil.example:8000", None, False),
        ("http://127.0.0.1@evil.example:8000", None, False),
        ("http://gpu-7.pool.svc:8000", "*.pool.svc, 10.0.0.*", True),
        ("http://10.0.0.7:8000", "*.pool.svc 10.0.0.*", True),
        ("http://127.0.0.1:8000", "*.pool.svc", False),
        ("http://gpu-7.pool.svc.evil.example", "*.pool.svc", False),
        ("http://10.0.0.attacker.example", "*.pool.svc, 10.0.0.*", False),
        ("http://10.0.1.7", "10.0.0.*", False),
        ("http://10.0.0.7", "10.0.0.0/24", True),
        ("http://10.0.0.attacker.example", "10.0.0.0/24", False),
        ("http://10.7:8000", "10.0.0.0/8", False),
        ("http://0x0a000007:8000", "10.0.0.0/8 0x0a000007.svc", False),
        ("http://[fd00::7]:8000", "fd00::/8", True),
        ("http://GPU-7.Pool.SVC.", "gpu-7.pool.svc", True),
        ("http://xpool.svc", "*.pool.svc", False),
        ("http://pool.svc", ".pool.svc", False),
        ("http://evil.example\\.pool.svc", "*.pool.svc", False),
        ("http://evil.example#.pool.svc", "*.pool.svc", False),
        ("http://evil.example/.pool.svc", "*.pool.svc", False),
        ("http://evil.example?.pool.svc", "*.pool.svc", False),
        ("http://evil.example\t.pool.svc", "*.pool.svc", False),
        ("http://gpu-7.pool.svc@evil.example", "*.pool.svc", False),
        ("http://gpu-7.pool.svc:70000", "*.pool.svc", False),
        ("http://gpu-7.pool\u3002svc", "*.pool.svc", False),
        ("http://\uff11\uff10.0.0.7", "10.0.0.0/8", False),
        ("http://010.0.0.7", "10.0.0.0/8", False),
        ("http://[::ffff:10.0.0.7]", "10.0.0.0/8", False),
        ("http://2130706433", None, False),
        ("http://127.1", None, False),
        ("http://localhost.evil.example", None, False),
        ("ftp://gpu-7.pool.svc", "*.pool.svc", False),
        (None, "gpu-7.pool.svc", False),
    ],
)
def test_a_lease_in_the_bucket_cannot_ask_for_the_token(
    url: str | None, hosts: str | None, may: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, "s3cret")
    monkeypatch.delenv(REPLICA_HOSTS_VARIABLE, raising=False)
    if hosts is not None:
        monkeypatch.setenv(REPLICA_HOSTS_VARIABLE, hosts)
    assert may_receive_token(_lease(url)) is may
    monkeypatch.delenv(TOKEN_VARIABLE)
    assert not may_receive_token(_lease(url))


@pytest.mark.parametrize(
    "pattern",
    [
        "*",
        "gpu-*",
        "*.*.svc",
        "http://10.0.0.7",
        "10.0.0.7:8000",
        "gpu-7.pool.svc:8000",
        "10.0.0.7/",
        "10.*.0.1",
        "10.0.0.*.example",
        "10.0.0.0/40",
        "a/b",
        "*.10",
        "1.2.3",
    ],
)
def test_a_pattern_that_says_nothing_exact_is_refused(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, "s3cret")
    monkeypatch.setenv(REPLICA_HOSTS_VARIABLE, f"gpu-7.pool.svc {pattern}")
    with pytest.raises(InputError, match=REPLICA_HOSTS_VARIABLE):
        may_receive_token(_lease("http://gpu-7.pool.svc"))


def test_the_command_line_of_a_replica_is_that_of_its_engine() -> None:
    url, state_dir = "file:///data/my-chain", Path("/state")
    followed = ["--follow", url, "--state-dir", "/state", "--every", "0"]
    embedded = replica_argv(url, state_dir, ["--every", "0"])
    assert embedded == [sys.executable, "-m", "weightline", "serve", "transformers", *followed]
    vllm = replica_argv(url, state_dir, ["--every", "0"], Path("/vllm/bin/python"))
    started = ["/vllm/bin/python", "-m", "weightline", "serve", "vllm", "my-chain", *followed]
    assert vllm[: len(started)] == started
    check_arguments(vllm[len(started) :])


def _lease(url: str | None, follows: str | None = None) -> Lease:
    return Lease(
        replica="r", holder="h", engine="transformers", host="here", pid=7, release="0", url=url, follows=follows,
        state="serving", renewed_at="2026-01-01T00:00:00Z", expires_at="2026-01-01T00:00:00Z", ttl_seconds=60,
    )  # fmt: skip


def _only(chain: Chain) -> ReachableReplica:
    (found,) = find_fleet(chain).reached
    return found


@pytest.mark.process
def test_a_python_without_vllm_is_not_taken_for_one_that_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for named in (tmp_path / "missing", Path(sys.executable)):
        monkeypatch.setenv(VLLM_PYTHON_VARIABLE, str(named))
        assert find_vllm_python() is None
        with pytest.raises(InputError, match=f"{named} is no Python with vLLM"):
            require_vllm_python()
    # A package of that name, in a folder that the named Python looks into.
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert find_vllm_python() == require_vllm_python() == Path(sys.executable)


@pytest.mark.flows
def test_a_stack_starts_one_replica_and_moves_on_to_the_newest_chain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = make_chain((tmp_path / "first").as_uri(), num_versions=2).chain
    second = make_chain((tmp_path / "second").as_uri()).chain
    monkeypatch.delenv(SERVING_URL_VARIABLE, raising=False)
    monkeypatch.setenv(REPLICAS_DIR_VARIABLE, str(tmp_path / "replicas"))
    try:
        address = _only(first)
        assert client.refresh(address.url, address.token, 1).version == 1
        (server,) = _servers(tmp_path)
        again = ensure_replica(first.url, tmp_path / "replicas")
        assert (again.url, again.token) == (address.url, address.token)
        assert _servers(tmp_path) == [server]

        other = _only(second)
        assert client.status(other.url).chain == second.url
        assert not server.is_running()

        (server,) = _servers(tmp_path)
        server.kill()
        back = _only(second)
        assert client.refresh(back.url, back.token, 0).version == 0
    finally:
        end_replicas(tmp_path / "replicas")
    assert _servers(tmp_path) == []


@pytest.mark.process
def test_a_replica_outlives_what_started_it_and_ends_with_its_worker(tmp_path: Path) -> None:
    chain = make_chain((tmp_path / "chain").as_uri()).chain
    program = (
        "import sys; from pathlib import Path; from weightline.fleet.local_replica import ensure_replica; "
        "print(ensure_replica(sys.argv[1], Path(sys.argv[2])).url)"
    )
    with subprocess.Popen(["sleep", "1000"]) as worker:
        try:
            env = os.environ | {WORKER_PID_VARIABLE: str(worker.pid)}
            argv = [sys.executable, "-c", program, chain.url, str(tmp_path / "replicas")]
            urls = {subprocess.check_output(argv, env=env, text=True) for _ in range(2)}
            assert len(urls) == 1
            (server,) = _servers(tmp_path)
            worker.kill()
            wait_until(lambda: not server.is_running())
        finally:
            worker.kill()
            end_replicas(tmp_path / "replicas")


def _servers(folder: Path) -> list[psutil.Process]:
    """The inference servers of the folder that run."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            argv = process.cmdline()
            is_server = "weightline.launch.tether" not in argv and "transformers" in argv
            if is_server and any(part.startswith(str(folder)) for part in argv):
                found.append(process)
    return [process for process in found if process.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.process
def test_a_server_that_does_not_come_up_is_quoted(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    with (tmp_path / "x" / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # as another replica on the same folder would
        try:
            with pytest.raises(LaunchError, match="in use by another replica"):
                ensure_replica((tmp_path / "chains" / "x").as_uri(), tmp_path)
        finally:
            end_replicas(tmp_path)
