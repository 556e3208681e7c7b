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
from weightline.chain.read.discovery import warn_if_empty
from weightline.chain.read.history import open_chain
from weightline.chain.read.records import EVALUATIONS, REFRESHES, SAMPLES, write_record
from weightline.chain.read.refs import move_ref
from weightline.chain.replay.state import read_state
from weightline.cli import output
from weightline.cli.main import app, main
from weightline.errors import ChainEmptyError, InputError, NotFoundError, WeightlineError
from weightline.format import keys
from weightline.format.header import pack_provenance, ref_to
from weightline.rollouts.record import Completion, Group, ReplicaWork, SamplesRecord, Spread, record_name
from weightline.rollouts.sample import Span


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


VERBS_OF_A_CHAIN = [
    ("log",), ("show",), ("diff", "0", "1"), ("plan",), ("pull", "--out", "OUT"), ("revert", "0"), ("fork", "OUT"),
    ("tag",), ("tag", "name"), ("verify",), ("verify", "--quick"), ("compact",), ("compact", "--dry-run"),
    ("expire", "0"), ("expire", "--keep", "1"), ("gc",), ("gc", "--delete"), ("sign", "--key", "KEY"),
    ("expire", "--keep-best", "1", "--metric", "score"), ("repair",), ("repair", "--delete"), ("repair", "--quick"),
    ("show", "--version", "1"), ("plan", "--to", "2"), ("diff", "0"), ("tag", "name", "1", "--move"),
]  # fmt: skip


@pytest.mark.parametrize("verb", VERBS_OF_A_CHAIN, ids=" ".join)
def test_a_misspelt_chain_is_the_same_error_in_every_verb(
    bucket: str, tmp_path: Path, verb: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    key = tmp_path / "key"
    run("keygen", str(key))
    names = {"OUT": str(tmp_path / "out"), "KEY": str(key)}
    wrong = bucket.replace("toy", "tyo")
    argv = ["weightline", verb[0], wrong, *(names.get(part, part) for part in verb[1:])]
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    root = (tmp_path / "bucket").as_uri()
    assert capsys.readouterr().err == f"error (chain-empty): {wrong} holds no version. Chains below {root}: toy\n"
    assert not (tmp_path / "bucket" / "tyo").exists()


def test_a_server_says_for_which_chain_it_waits(bucket: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    wrong = bucket.replace("toy", "tyo")
    expected = f"{wrong} holds no version. Chains below {(tmp_path / 'bucket').as_uri()}: toy"
    warn_if_empty(open_chain(wrong))
    warn_if_empty(open_chain(bucket))
    assert [record.message for record in caplog.records] == [f"waiting for the first version: {expected}"]
    with pytest.raises(ChainEmptyError, match=f"^{expected}$"):
        run("serve", "sglang", "--follow", wrong, "--out", str(tmp_path / "out"), "--every", "0")


def test_a_folder_of_chains_is_refused_with_their_names(bucket: str, tmp_path: Path) -> None:
    commit_state(open_chain(f"file://{tmp_path}/bucket/runs/other"), random_state(0))
    root = (tmp_path / "bucket").as_uri()
    with pytest.raises(ChainEmptyError, match=rf"^{root} holds no version. Chains below {root}: runs/other, toy$"):
        run("log", str(tmp_path / "bucket"))
    with pytest.raises(ChainEmptyError, match=rf"Chains below {tmp_path.as_uri()}: bucket/runs/other, bucket/toy$"):
        run("show", str(tmp_path / "buckte" / "toy"))
    (tmp_path / "empty" / "inner").mkdir(parents=True)
    with pytest.raises(ChainEmptyError, match=r"There is no chain below .*/empty either$"):
        run("log", str(tmp_path / "empty" / "inner" / "x").replace("/inner/x", "/x"))


def test_versions_are_named_as_an_argument_or_with_version(bucket: str, tmp_path: Path) -> None:
    for form in (["1"], ["--version", "1"]):
        assert run_json("show", bucket, *form)["version"] == 1
        assert run_json("plan", bucket, *form)["want"] == 1
        assert run_json("diff", bucket, *form)["a"] == 1
        assert run_json("pull", bucket, *form, "--out", str(tmp_path / form[0]))["version"] == 1
        assert run_json("fork", bucket, f"file://{tmp_path}/fork{form[0]}", *form)["forked_from"]["version"] == 1
        assert run_json("revert", bucket, *form)["reverts_to"] == 1
        run("tag", bucket, f"named-{len(form)}", *form)
    assert {ref["version"] for ref in run_json("tag", bucket)["refs"]} == {1}
    both = run_json("diff", bucket, "--version", "0", "--version", "2")
    assert (both["a"], both["b"]) == (0, 2)
    assert run_json("plan", bucket, "--to", "2")["want"] == 2
    for form in (["2"], ["--before", "2"], ["--version", "2"]):
        assert run_json("expire", bucket, *form)["oldest_kept"] == 2


@pytest.mark.parametrize(
    "arguments",
    [
        ("show", "1", "--version", "2"), ("revert",), ("revert", "1", "--version", "1"), ("expire",),
        ("expire", "1", "--keep", "2"), ("expire", "--keep-best", "1"), ("expire", "--keep", "1", "--metric", "x"),
        ("expire", "1", "--before", "1"), ("diff",), ("diff", "0", "1", "--version", "2"), ("expire", "--keep", "0"),
        ("expire", "1", "--lowest"), ("expire", "--keep", "1", "--lowest"), ("tag", "--version", "1"),
        ("tag", "--move"), ("plan", "1", "--to", "1"), ("plan", "1", "--version", "1"),
        ("fork", "memory://x", "1", "--version", "1"), ("tag", "x", "1", "--version", "1"),
        ("pull", "1", "--version", "1", "--out", "x"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_a_version_that_is_named_twice_or_not_at_all_is_wrong_usage(bucket: str, arguments: tuple[str, ...]) -> None:
    result = CliRunner().invoke(app, [arguments[0], bucket, *arguments[1:]])
    assert result.exit_code == 2
    assert open_chain(bucket).tip_version() == 3


@pytest.mark.parametrize("arguments", [("",), ("--recipe", ""), ("--resume", ""), ("arithmetic", "--resume", "")])
def test_what_a_variable_without_a_value_leaves_starts_no_training(
    arguments: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["run", *arguments])
    assert (result.exit_code, "it is empty" in result.output) == (2, True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("gc", "URL", "--grace-hours", "inf"), "grace is inf hours"),
        (("gc", "URL", "--grace-hours", "1e12", "--delete"), r"grace is 1e\+12 hours"),
        (("compact", "URL", "--coding", "zip"), "unknown coding 'zip'"),
        (("commit", "NEW", "FOLDER", "--coding", "zip"), "unknown coding 'zip'"),
        (("log", "~no-such-user/chain"), "holds no version"),
        (("keygen", ""), "name a new file"),
        (("keygen", "/"), "name a new file"),
        (("serve", "transformers", "--follow", "URL", "--lease", "nan"), "lease TTL must be"),
        (("serve", "transformers", "--follow", "URL", "--lease", "-5"), "lease TTL must be"),
        (("serve", "transformers", "--follow", "URL", "--drain", "inf"), "cannot wait inf s"),
        (("serve", "transformers", "--follow", "URL", "--every", "inf"), "cannot follow every inf s"),
        (("serve", "transformers", "--follow", "URL", "--name", "a/b"), "'a/b' cannot be part"),
        (("serve", "transformers", "--follow", "URL", "--ref", ""), "'' cannot be part"),
        (("serve", "transformers", "--follow", "URL", "--advertise", "ftp://x"), "'ftp://x' is no URL"),
        (("serve", "transformers", "--follow", "URL", "--advertise", "gpu-7:8000"), "'gpu-7:8000' is no URL"),
    ],
    ids=lambda part: " ".join(part) if isinstance(part, tuple) else "",
)  # fmt: skip
def test_a_value_that_cannot_be_is_a_typed_error(
    bucket: str, tmp_path: Path, arguments: tuple[str, ...], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.chdir(tmp_path)
    names = {"URL": bucket, "FOLDER": str(tmp_path / "model"), "NEW": f"file://{tmp_path}/new"}
    if "FOLDER" in arguments:
        run("pull", bucket, "--out", names["FOLDER"])
    with pytest.raises(WeightlineError, match=said):
        run(*(names.get(part, part) for part in arguments))
    assert open_chain(bucket).tip_version() == 3
    assert not (tmp_path / "new").exists()


def test_log_shows_a_screenful_with_scores_and_refs(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chain = open_chain(bucket)
    write_record(chain, EVALUATIONS, 2, "gsm8k", {"status": "done", "score": 0.7312341})
    write_record(chain, EVALUATIONS, 1, "gsm8k", {"status": "skipped", "newer_version": 2})
    move_ref(chain, "best", 2)
    move_ref(chain, "v1", 2, is_tag=True)
    header, newest, second, third, *_ = run("log", bucket).splitlines()
    assert header.split() == (
        ["version", "kind", "stage", "step", "changed", "bytes", "of", "full", "score", "refs", "committed"]
    )
    assert second.split()[-5:-2] == ["0.731234", "best,", "v1"]
    assert newest.split()[-4:-2] == ["-", "-"]
    assert "skipped" in third
    told = run_json("log", bucket)["versions"]
    assert [(one["score"], one["refs"]) for one in told] == [
        (None, []),
        (0.7312341, ["best", "v1"]),
        (None, []),
        (None, []),
    ]
    monkeypatch.setenv("LINES", "9")
    for seed in range(4, 9):
        commit_state(chain, nudged(random_state(0), seed), random_state(0))
    lines = run("log", bucket).splitlines()
    assert [line.split()[0] for line in lines[1:-1]] == ["8", "7", "6", "5", "4"]
    assert lines[-1] == "5 of 9 versions; --limit 9 shows all"
    assert len(run("log", bucket, "--limit", "9").splitlines()) == 10
    assert len(run_json("log", bucket)["versions"]) == run_json("log", bucket, "--limit", "1")["num_versions"] == 9


def test_a_bad_record_or_ref_hides_no_version(bucket: str) -> None:
    chain = open_chain(bucket)
    for key, body in (
        (keys.record(EVALUATIONS, 2, "broken"), b"{"),
        (
            keys.record(EVALUATIONS, 3, "huge"),
            b'{"version":3,"name":"huge","status":"done","score":1' + b"0" * 400 + b"}",
        ),
        (f"{keys.RECORDS}{EVALUATIONS}/other", b"{}"),
        (keys.ref("x", 0), b"{}"),
    ):
        chain.store.put(key, body)
    result = CliRunner().invoke(app, ["log", bucket], catch_exceptions=False)
    assert (result.exit_code, len(result.stdout.splitlines())) == (0, 5)
    assert "warning: records/evaluations/00000000000000000002/broken.json" in result.stderr
    assert "warning: refs/x/" in result.stderr


def test_show_is_a_page_and_no_spelling_of_python(bucket: str) -> None:
    chain = open_chain(bucket)
    key = keys.commit(3)
    links = pack_provenance({"host": "a\x1b[2Jb"})
    chain.store.put(keys.provenance(ref_to(links).sha256), links)
    labels = {"metrics": {"loss": 0.25, "reward": 1.5}, "provenance": ref_to(links).model_dump()}
    chain.store.put(key, json.dumps(json.loads(chain.store.get(key)) | labels).encode())
    told = {"status": "done", "score": 0.5, "metrics": {"exact_match": 0.5}, "seconds": 2.0}
    write_record(chain, EVALUATIONS, 3, "gsm8k", told)
    served = {"status": "done", "served_at": "2026-11-30T06:00:00Z", "pause_seconds": 0.011}
    write_record(chain, REFRESHES, 3, "replica-0", served)
    page = run("show", bucket)
    assert not set("{}[]'\x1b") & set(page.replace("a?[2Jb", ""))
    assert "None" not in page
    lines = [line.split() for line in page.splitlines()]
    for expected in (
        ["version", "3"], ["global", "step", "3"], ["loss", "0.25"], ["host", "a?[2Jb"],
        ["evaluation", "status", "score", "seconds", "recorded", "at", "exact_match"],
        ["replica", "status", "served", "at", "pause", "seconds"], ["tensor", "dtype", "shape", "digest"],
    ):  # fmt: skip
        assert expected in lines or expected[:2] in [line[:2] for line in lines], expected
    document = run_json("show", bucket)
    assert document["evaluations"][0]["score"] == 0.5
    assert document["refreshes"][0]["pause_seconds"] == 0.011


def test_a_chain_with_rollouts_shows_the_age_and_the_texts_of_samples(bucket: str) -> None:
    assert "staleness" not in run("log", bucket)
    chain = open_chain(bucket)
    key = keys.commit(3)
    metrics = {"metrics": {"rollout/staleness_mean": 1.25, "rollout/staleness_max": 2.0}}
    chain.store.put(key, json.dumps(json.loads(chain.store.get(key)) | metrics).encode())
    groups = (Group("2+\n3=", (Completion("5\x1b[2J", 1.0, (Span(1, 12), Span(2, 3))),), 8),)
    record = SamplesRecord(
        7, Spread(1.25, None, 2.0), 0.5, made_by={1: 6, 2: 2}, replicas={"r\x1b-0": ReplicaWork(8, 2.0)}, groups=groups
    )
    write_record(chain, SAMPLES, 3, record_name("grpo", 7), record.to_record())
    earlier = SamplesRecord(6, Spread(mean=0.5, max=1.0))
    write_record(chain, SAMPLES, 1, record_name("grpo", 6), earlier.to_record())
    header, newest, older, logged_nothing, *_ = run("log", bucket).splitlines()
    assert header.endswith("  staleness")
    assert logged_nothing.split()[-2:] == ["0.5,", "1"]
    assert newest.split()[-2:] == ["1.25,", "2"]
    assert older.split()[-1] == "-"
    assert [one["staleness"] for one in run_json("log", bucket)["versions"]] == [[1.25, 2.0], None, [0.5, 1.0], None]
    page = run("show", bucket)
    assert "\x1b" not in page
    lines = [" ".join(line.split()) for line in page.splitlines()]
    for expected in (
        "trained on samples of step 7", "samples by the version that made them v1: 6, v2: 2",
        "staleness in versions mean 1.25, max 2", "waited for them 0.5 s", "generated by samples time a second",
        "r?-0 8 2 s 4.0", "prompt 2+\\n3=", "1 v1 12, v2 3 5?[2J", "and 7 more completions",
    ):  # fmt: skip
        assert expected in lines, expected
    assert run_json("show", bucket)["samples"][0]["made_by"] == {"1": 6, "2": 2}
    chain.store.put(keys.record(SAMPLES, 3, "grpo-8"), b'{"version":3,"name":"grpo-8","status":7')
    shown = CliRunner().invoke(app, ["show", bucket], catch_exceptions=False)
    assert "trained on samples of step 7" in shown.stdout
    assert "warning: records/samples/00000000000000000003/grpo-8.json" in shown.stderr


def test_expire_keeps_the_newest_and_the_best(bucket: str) -> None:
    chain = open_chain(bucket)
    for version, score in enumerate((0.9, 0.1, 0.8, 0.2)):
        write_record(chain, EVALUATIONS, version, "gsm8k", {"status": "done", "score": score})
    told = run_json("expire", bucket, "--keep", "1", "--keep-best", "2", "--metric", "score")
    assert told["oldest_kept"] == 3
    assert told["best"] == [
        {"ref": "best-score-1", "version": 0, "value": 0.9}, {"ref": "best-score-2", "version": 2, "value": 0.8},
    ]  # fmt: skip
    run("gc", bucket, "--grace-hours", "0", "--delete")
    assert run_json("verify", bucket)["holds"]
    for version in (0, 2, 3):
        read_state(open_chain(bucket), version)
    # A smaller number later keeps no more than it says.
    told = run_json("expire", bucket, "--keep-best", "1", "--metric", "score")
    assert [ref["version"] for ref in run_json("tag", bucket)["refs"]] == [0, 0]
    lowest = run_json("expire", bucket, "--keep-best", "1", "--metric", "score", "--lowest")["best"]
    assert lowest == [{"ref": "best-score-1", "version": 3, "value": 0.2}]
    with pytest.raises(InputError, match="no version has the metric 'loss': known are score"):
        run("expire", bucket, "--keep-best", "1", "--metric", "loss")
    assert "best-score-1" in run("expire", bucket, "--keep-best", "1", "--metric", "score")


def test_metrics_that_are_spelt_alike_have_refs_of_their_own(bucket: str) -> None:
    chain = open_chain(bucket)
    for version in (1, 2):
        metrics = {"eval/loss": version, "eval_loss": -version, "Eval loss": -version, "x" * 200: version}
        write_record(chain, EVALUATIONS, version, "gsm8k", {"status": "done", "score": 0.5, "metrics": metrics})
    named = {}
    for metric in ("eval/loss", "eval_loss", "Eval loss", "x" * 200):
        (best,) = run_json("expire", bucket, "--keep-best", "1", "--metric", metric, "--before", "0")["best"]
        named[best["ref"]] = best["version"]
    assert list(named.values()) == [2, 1, 1, 2]
    assert {ref["name"]: ref["version"] for ref in run_json("tag", bucket)["refs"]} == named
    assert "best-eval_loss-1" in named


def test_a_label_cannot_write_to_the_terminal() -> None:
    assert output.printable("a\x1b[31m\nb\ud800") == "a?[31m?b?"
    assert output.printable("x" * 200) == "x" * 117 + "..."
    assert output.table(["a"], [["\x07"]])[1] == "?"
