"""What works with a plain `pip install weightline`, and what the other commands say of the extra that they lack."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests import ROOT
from tests.chains import commit_state, nudged, random_state
from tests.serving.model_chains import make_chain
from tests.waiting import PATIENCE_SECONDS, wait_until
from weightline import extras
from weightline.chain import open_chain
from weightline.deployments.stack.stack import free_port
from weightline.errors import MissingExtraError

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CHAIN = "memory://nobody/toy"
#: What lacks an extra, and the extra that it names.
LACKING: list[tuple[str | list[str], str]] = [
    (["run"], "train,prefect,eval,serve"),
    (["up"], "prefect,dashboard"),
    (["down"], "prefect"),
    (["deploy"], "prefect"),
    (["stay"], "prefect,dashboard"),
    (["serve", "transformers", "--follow", CHAIN], "serve"),
    (["serve", "front", "--follow", CHAIN], "front"),
    (["serve", "vllm", "model", "--follow", CHAIN], "vllm"),
    (["serve", "sglang", "--follow", CHAIN, "--out", "folders"], "serve"),
    (["serve", "environment", "word-game"], "environment"),
    (["dashboard", CHAIN], "dashboard"),
    (["keygen", "key"], "sign"),
    (["sign", CHAIN, "--key", "key"], "sign"),
    (["verify", CHAIN, "--require-signature", "key.pub"], "sign"),
    ("import weightline.trainer.callback", "train"),
    ("import weightline.flows.post_training", "prefect"),
    ("import weightline.tasks.training", "prefect"),
    ("from weightline.launch.peer import main; main(['runs', '--machine-rank', '1'])", "train"),
    (
        "from weightline.chain import open_chain; from weightline.lineage.openlineage import export_version; "
        "import os; os.environ['OPENLINEAGE_URL'] = 'http://127.0.0.1:9'; "
        f"export_version(open_chain('{CHAIN}'), 0)",
        "openlineage",
    ),
    (
        "from pathlib import Path; from weightline.chain import open_chain; "
        "from weightline.evaluation.evaluate import measure_version; "
        f"measure_version(open_chain('{CHAIN}'), 0, None, Path('work'))",
        "eval",
    ),
]


def run_blocked(cases: list[str | list[str]], folder: Path) -> list[tuple[int, str, str]]:
    """Runs the cases without any optional dependency, in one process that works in `folder`."""
    (folder / "key").write_text("a key\n")
    (folder / "key").chmod(0o600)
    (folder / "key.pub").write_text("-----BEGIN PUBLIC KEY-----\n-----END PUBLIC KEY-----\n")
    argv = [sys.executable, "-m", "tests.package.blocked"]
    done = subprocess.run(
        argv, input=json.dumps(cases), cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [tuple(result) for result in json.loads(done.stdout)]


@pytest.mark.process
def test_everything_that_lacks_an_extra_says_in_one_line_what_to_install(tmp_path: Path) -> None:
    results = run_blocked([case for case, _ in LACKING], tmp_path)
    for (case, extra), (code, out, err) in zip(LACKING, results, strict=True):
        assert (code, out) == (1, ""), (case, out, err)
        assert len(err.splitlines()) == 1, (case, err)
        assert f"pip install 'weightline[{extra}]'" in err, case
        assert ("error (missing-extra): " in err) or err.startswith("MissingExtraError: "), case


@pytest.mark.process
def test_the_core_reads_commits_pulls_and_verifies_without_any_extra(tmp_path: Path) -> None:
    url = (tmp_path / "bucket").as_uri()
    states = [random_state(0)]
    commit_state(open_chain(url), states[0])
    for seed in (1, 2):
        states.append(nudged(states[-1], seed))
        commit_state(open_chain(url), states[-1], states[-2])
    verbs: list[str | list[str]] = [
        ["log", url], ["show", url], ["diff", url, "0"], ["plan", url], ["pull", url, "--out", "out"],
        ["commit", url, "out", "--stage", "again"], ["revert", url, "1"], ["fork", url, "fork"], ["tag", url, "good"],
        ["compact", url], ["expire", url, "--before", "1"], ["gc", url, "--delete", "--grace-hours", "0"],
        ["verify", url], ["bench", "codec", "out", "out"], ["plan-cluster", "--params", "1e9", "--ranks", "8"],
    ]  # fmt: skip
    for verb, (code, _, err) in zip(verbs, run_blocked(verbs, tmp_path), strict=True):
        assert (code, err) == (0, ""), verb
    assert open_chain(url).manifest(3).digests == open_chain(url).manifest(2).digests


@contextmanager
def _installed_alone(extra: str, cases: list[list[str]], folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Runs commands with one extra in a process. All must succeed; the last one serves until SIGTERM ends it."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.package.blocked", extra], cwd=folder, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True,
    )  # fmt: skip
    try:
        assert process.stdin is not None
        process.stdin.write(json.dumps([["up"], *cases]))
        process.stdin.close()
        process.stdin = None
        yield process
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_SECONDS) == 0
        assert process.stdout is not None
        refused, *done = json.load(process.stdout)
        assert "pip install 'weightline[prefect" in refused[2]
        assert [code for code, _, _ in done[:-1]] == [0] * (len(cases) - 1), done
        assert done[-1][0] in (0, 128 + signal.SIGTERM), done
    finally:
        process.kill()
        process.communicate()


def _answered(process: subprocess.Popen[str], ask: Callable[[], httpx.Response]) -> Any:
    """The body of the first answer of 200."""

    def asked() -> httpx.Response | None:
        with suppress(httpx.TransportError, FileNotFoundError):
            return ask()
        return None

    def require_running() -> None:
        assert process.poll() is None, process.stderr and process.stderr.read()

    found = wait_until(
        asked, lambda answer: answer is not None and answer.status_code == 200, meanwhile=require_running
    )
    assert found is not None
    return found.json()


@pytest.mark.process
def test_an_install_of_serve_alone_serves_a_chain(tmp_path: Path) -> None:
    url, address = (tmp_path / "bucket").as_uri(), tmp_path / "state" / "address.json"
    make_chain(url)
    options = ["--follow", url, "--port", "0", "--state-dir", str(address.parent), "--device", "cpu"]
    cases = [["serve", "transformers", "--help"], ["serve", "transformers", *options]]
    body = {"prompt": "1+1=", "max_tokens": 3}

    def complete() -> httpx.Response:
        server = json.loads(address.read_text())["url"]
        return httpx.post(f"{server}/v1/completions", json=body, timeout=PATIENCE_SECONDS, trust_env=False)

    with _installed_alone("serve", cases, tmp_path) as process:
        answer = _answered(process, complete)
    assert answer["weightline_version"] == 0
    assert len(answer["choices"]) == 1


@pytest.mark.process
def test_an_install_of_dashboard_alone_shows_a_chain(tmp_path: Path) -> None:
    url, port = (tmp_path / "bucket").as_uri(), free_port(4300)
    commit_state(open_chain(url), random_state(0))
    page = f"http://127.0.0.1:{port}/api/chains"
    with _installed_alone(
        "dashboard", [["dashboard", "--help"], ["dashboard", url, "--port", str(port)]], tmp_path
    ) as p:
        shown = _answered(p, lambda: httpx.get(page, timeout=PATIENCE_SECONDS, trust_env=False))
    assert [card["url"] for card in shown["chains"]] == [url]


def test_each_extra_brings_the_modules_that_are_looked_for() -> None:
    brought = importlib.metadata.packages_distributions()
    declared = PROJECT["optional-dependencies"]
    for extra, modules in extras.MODULES.items():
        named = {canonicalize_name(Requirement(line).name) for line in declared[extra]}
        for module in modules:
            distributions = {canonicalize_name(name) for name in brought.get(module, [module])}
            assert distributions & named, f"[{extra}] does not bring {module}"


def test_all_is_every_extra_that_a_pipeline_on_one_machine_needs() -> None:
    (line,) = PROJECT["optional-dependencies"]["all"]
    assert Requirement(line).extras == set(extras.MODULES) - {"vllm", "environment"}


def test_an_import_that_fails_for_another_reason_is_not_blamed_on_the_extra() -> None:
    with pytest.raises(ModuleNotFoundError, match="no_such_module"), extras.requires("train"):
        __import__("no_such_module")


def test_several_missing_modules_are_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(extras.MODULES, "train", ("no_such_b", "torch", "no_such_a"))
    with pytest.raises(MissingExtraError, match=re.escape("no_such_a and no_such_b are not installed: pip install")):
        extras.check_installed("train", "sign")
