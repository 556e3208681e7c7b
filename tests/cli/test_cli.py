"""The command line as a person and a script use it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from tests.chains import commit_state, nudged, random_state
from weightline.chain.read.history import Chain, open_chain
from weightline.chain.replay.state import read_state
from weightline.cli.main import app
from weightline.errors import InputError, NotFoundError


@pytest.fixture
def bucket(tmp_path: Path) -> str:
    url = f"file://{tmp_path}/bucket/toy"
    states = [random_state(0)]
    commit_state(open_chain(url), states[0], is_milestone=True)
    for seed in (1, 2, 3):
        states.append(nudged(states[-1], seed))
        commit_state(open_chain(url), states[-1], states[-2])
    return url


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def run_json(*arguments: str) -> Any:
    return json.loads(run(*arguments, "--json"))


def test_a_chain_is_signed_and_checked(bucket: str, tmp_path: Path) -> None:
    key_id = run_json("keygen", str(tmp_path / "key"))["key_id"]
    public = str(tmp_path / "key.pub")
    result = CliRunner().invoke(app, ["verify", bucket, "--require-signature", public])
    assert result.exit_code == 1
    assert "is not signed by a trusted key" in result.output
    assert run_json("sign", bucket, "--key", str(tmp_path / "key")) == {"key_id": key_id, "num_signed": 4}
    assert "all holds" in run("verify", bucket, "--require-signature", public)


def test_log(bucket: str) -> None:
    versions = run_json("log", bucket)["versions"]
    assert [v["version"] for v in versions] == [3, 2, 1, 0]
    assert {"version", "kind", "stage", "num_changed", "num_elements", "payload_nbytes", "full_nbytes"} <= set(
        versions[0]
    )
    assert [v["version"] for v in run_json("log", bucket, "--limit", "1")["versions"]] == [3]
    assert run("log", bucket).splitlines()[1].split()[:3] == ["3", "delta", "sft"]


def test_show_and_diff(bucket: str) -> None:
    shown = run_json("show", bucket, "1")
    assert shown["version"] == 1
    assert shown["evaluations"] == []
    assert "payload" in run("show", bucket)
    diff = run_json("diff", bucket, "0", "1")
    assert diff["num_changed"] == shown["num_changed"] > 0
    assert run_json("diff", bucket, "2", "2")["num_changed"] == 0


def test_pull_and_commit_make_another_chain_of_the_same_bits(bucket: str, tmp_path: Path) -> None:
    other = f"file://{tmp_path}/other"
    for version in ("0", "3"):
        run("pull", bucket, "--version", version, "--out", str(tmp_path / version))
        run("commit", other, str(tmp_path / version), "--stage", "mine")
    assert open_chain(other).manifest(1).digests == open_chain(bucket).manifest(3).digests
    assert run_json("log", other)["versions"][0]["stage"] == "mine"
    with pytest.raises(InputError, match="not empty"):
        run("pull", bucket, "--version", "1", "--out", str(tmp_path / "3"))


def test_revert_fork_tag(bucket: str, tmp_path: Path) -> None:
    run("tag", bucket, "good", "--version", "1")
    assert run_json("revert", bucket, "good")["reverts_to"] == 1
    chain = open_chain(bucket)
    assert chain.tip().digests == chain.manifest(1).digests
    fork = f"file://{tmp_path}/fork"
    assert run_json("fork", bucket, fork, "--version", "2")["forked_from"]["version"] == 2
    state = read_state(open_chain(fork), 0)
    assert np.array_equal(state.bits["scale"], read_state(chain, 2).bits["scale"])
    with pytest.raises(InputError, match="a tag never moves"):
        run("tag", bucket, "good", "--version", "2")
    assert [r["name"] for r in run_json("tag", bucket)["refs"]] == ["good"]
    with pytest.raises(NotFoundError, match="no ref"):
        run("show", bucket, "bad")


def test_compact_expire_gc_verify(bucket: str) -> None:
    planned = run_json("compact", bucket, "--dry-run")
    assert planned["shortcuts"] == []
    run("compact", bucket)
    assert run_json("expire", bucket, "--before", "2")["oldest_kept"] == 2
    dry = run_json("gc", bucket, "--grace-hours", "0")
    assert dry["num_objects"] > 0
    assert run_json("log", bucket)["versions"][-1]["version"] == 0
    assert run_json("gc", bucket, "--grace-hours", "0", "--delete")["keys"] == dry["keys"]
    assert [v["version"] for v in run_json("log", bucket)["versions"]] == [3, 2]
    assert run_json("verify", bucket)["holds"]
    assert run_json("plan", bucket, "--to", "3")["hops"][0]["from"] is None


def test_verify_finds_a_flipped_bit_and_a_missing_object(bucket: str) -> None:
    chain = open_chain(bucket)
    key = chain.manifest(2).payloads[0].key
    body = bytearray(chain.store.get(key))
    body[len(body) // 2] ^= 1
    chain.store.put(key, bytes(body))
    assert run_json("verify", bucket, "--quick")["holds"]
    assert _findings(bucket) == {"replay"}
    chain.store.delete(key)
    assert _findings(bucket) == {"object-missing"}


def _findings(bucket: str) -> set[str]:
    result = CliRunner().invoke(app, ["verify", bucket, "--json"])
    assert result.exit_code == 1
    return {finding["rule"] for finding in json.loads(result.output)["findings"]}


@pytest.mark.process
def test_an_error_is_one_line_with_its_kind(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "weightline.cli.main"]
    text = subprocess.run([*command, "log", "ftp://x"], capture_output=True, text=True)
    assert (text.returncode, text.stdout) == (1, "")
    assert text.stderr.startswith("error (input): ftp://x: no store for")
    told = subprocess.run([*command, "verify", str(tmp_path / "none"), "--json"], capture_output=True, text=True)
    assert told.returncode == 1
    assert json.loads(told.stderr)["error"]["kind"] == "chain-empty"


@pytest.mark.process
def test_a_commit_says_in_one_line_what_it_leaves_out_or_lacks(bucket: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    run("pull", bucket, "--out", str(folder))
    (folder / "training_args.bin").write_bytes(b"x")
    (folder / "checkpoint-5").mkdir()
    command = [sys.executable, "-m", "weightline.cli.main", "commit", bucket, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.startswith("version 4 (delta)")
    left_out = "checkpoint-5/ (a checkpoint of its own), training_args.bin (of a training)"
    assert f"{folder}: left out of the version: {left_out}" in done.stderr.splitlines()
    (folder / "config.json").symlink_to("../blobs/0")
    refused = subprocess.run(command, capture_output=True, text=True)
    assert (refused.returncode, refused.stdout, len(refused.stderr.splitlines())) == (1, "", 1)
    assert "which does not exist: the checkpoint is not whole" in refused.stderr


def test_plan_cluster() -> None:
    cost = run_json("plan-cluster", "--params", "1e12", "--ranks", "512", "--density", "0.01")["cost"]
    assert cost["full_nbytes"] == 2e12
    assert cost["baseline_nbytes_per_rank"] == pytest.approx(2e12 / 512)
    assert 0.004 < cost["ratio_to_full"] < 0.006
    with pytest.raises(InputError, match="density"):
        run("plan-cluster", "--params", "1e9", "--ranks", "8", "--density", "1.5")
    for part in ("capture", "encode", "decode", "apply"):
        option = f"--{part}-elements-per-second"
        slower = run_json("plan-cluster", "--params", "1e12", "--ranks", "512", option, "1e6")
        assert slower["cluster"][f"{part}_elements_per_second"] == 1e6
        assert slower["cost"]["publish_seconds"] + slower["cost"]["refresh_seconds"] > (
            cost["publish_seconds"] + cost["refresh_seconds"]
        )
    assert (
        run_json("plan-cluster", "--params", "1", "--ranks", "1", "--commit-seconds", "2")["cost"]["publish_seconds"]
        > 2
    )


def test_a_chain_without_versions_is_said_to_be_empty(tmp_path: Path) -> None:
    assert Chain(open_chain(str(tmp_path)).store).tip_version() is None
    assert run_json("log", str(tmp_path))["versions"] == []
