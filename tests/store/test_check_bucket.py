"""The script that users run on their own bucket: it passes on sound stores and names what a bad one breaks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hub_emulator import HubEmulator
from tests.store.proxy import Proxy
from weightline.store import open_store

_SCRIPT = Path(__file__).parents[2] / "infra" / "check_bucket.py"


def _run(url: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(_SCRIPT), url, "--mib", "17"],
        capture_output=True, text=True, timeout=300, env=os.environ | {"WEIGHTLINE_CACHE_NBYTES": "0"},
    )  # fmt: skip


@pytest.mark.process
@pytest.mark.parametrize(
    "any_url", ["local", "s3", *(pytest.param(name, marks=pytest.mark.nightly) for name in ("az", "gs"))], indirect=True
)
def test_sound_buckets_pass(any_url: str) -> None:
    done = _run(any_url)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 11
    assert all(line.startswith("ok ") for line in lines[1:])


@pytest.mark.parametrize("any_url", ["hub", "hub_s3"], indirect=True)
def test_a_sound_hub_passes(hub: HubEmulator, any_url: str) -> None:
    hub.page_nitems = 300
    done = _run(any_url)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout.splitlines()) == 13
    assert "300 a page, in key order" in done.stdout
    assert ("5 puts, shown after" in done.stdout) == (open_store(any_url).commit_mode == "s3-gateway")
    assert list(open_store(any_url).list("")) == []


def test_listings_that_lag_are_told_and_waited_for(s3_url: str, s3_proxy: Proxy) -> None:
    s3_proxy.list_lag_seconds = 0.7
    done = _run(s3_url)
    assert done.returncode == 1
    assert done.stderr == ""
    failed = {line.split(": ")[0] for line in done.stdout.splitlines() if line.startswith("FAIL")}
    # A commit right after another may not see it, and is refused then.
    assert failed - {"FAIL  a chain is committed and pulled"} == {"FAIL  a listing sees the write before it"}
    assert "listed up to " in done.stdout
    s3_proxy.list_lag_seconds = 0.0
    assert list(open_store(s3_url).list("")) == []


def test_a_bucket_that_ignores_create_only_fails(s3_url: str, s3_proxy: Proxy) -> None:
    s3_proxy.dropped_headers = frozenset({"if-none-match"})
    done = _run(s3_url)
    assert done.returncode == 1
    assert "FAIL  create-only is honored" in done.stdout


def test_a_bucket_that_is_not_there_fails(s3_url: str) -> None:
    done = _run("s3://no-such-bucket/x")
    assert done.returncode == 1
    assert "no such bucket" in done.stdout
