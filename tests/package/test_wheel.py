"""The wheel as a user has it: installed into a new environment, used in a folder that has nothing of the checkout."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest

from tests import ROOT
from tests.package.installed import DECOYS, Installed, build_wheel, install
from tests.runs.recipes import write_recipe
from tests.waiting import PATIENCE_SECONDS, wait_until
from weightline.deployments.stack.database import Postgres, find_postgres
from weightline.deployments.stack.folder import StackFolder, StackRecord, running_stack
from weightline.deployments.stack.stack import free_port
from weightline.launch.processes import ProcessTree, marked_environment

pytestmark = [pytest.mark.process, pytest.mark.train, pytest.mark.flows, pytest.mark.timeout(1800)]

_TRAINING = """
import sys
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from weightline import WeightlineCallback

config = LlamaConfig(
    vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, dtype="bfloat16"
)
rows = [{"input_ids": torch.arange(8) + i, "labels": torch.arange(8) + i} for i in range(16)]
arguments = TrainingArguments("out", max_steps=2, learning_rate=1e-2, use_cpu=True, report_to=[], save_strategy="no")
trainer = Trainer(LlamaForCausalLM(config).to(torch.bfloat16), arguments, train_dataset=rows)
trainer.add_callback(WeightlineCallback(sys.argv[1], stage="mine"))
trainer.train()
trainer.save_model("saved")
print("prefect" in sys.modules)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    return install(wheel, tmp_path_factory.mktemp("installed"))


def _files_of_the_package() -> set[str]:
    """Every file below weightline/, links followed, by its path in the wheel."""
    return {
        (Path(folder) / name).relative_to(ROOT).as_posix()
        for folder, _, names in os.walk(ROOT / "weightline", followlinks=True)
        for name in names
        if not folder.endswith("__pycache__")
    }


def test_the_wheel_holds_the_package_with_all_its_files_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    (metadata,) = {name.partition("/")[0] for name in names if ".dist-info/" in name}
    assert {name for name in names if not name.startswith(f"{metadata}/")} == _files_of_the_package()
    assert f"{metadata}/licenses/LICENSE" in names


def test_the_installed_package_is_imported_and_not_the_checkout(installed: Installed) -> None:
    program = "import weightline.flows.post_training as flow; print(flow.__file__)"
    assert installed.run(str(installed.python), "-c", program).startswith(str(installed.site_packages))
    decoy = f"import {DECOYS[0]}"
    refused = subprocess.run([installed.python, "-c", decoy], cwd=installed.folder, capture_output=True, text=True)
    assert "the decoy flows was imported" in refused.stderr
    assert installed.weightline("--version").startswith("weightline ")


def test_the_callback_commits_what_a_plain_trainer_trains(installed: Installed) -> None:
    (installed.folder / "train.py").write_text(_TRAINING)
    assert installed.run(str(installed.python), "train.py", "bucket").splitlines()[-1] == "False"
    log = json.loads(installed.weightline("log", "bucket", "--json"))["versions"]
    assert [(one["version"], one["stage"]) for one in log] == [(2, "mine"), (1, "mine"), (0, "mine")]
    assert json.loads(installed.weightline("verify", "bucket", "--json"))["holds"]
    installed.weightline("commit", "again", "saved")
    installed.weightline("pull", "bucket", "--out", "pulled")
    installed.weightline("commit", "again", "pulled")
    assert json.loads(installed.weightline("diff", "again", "0", "1", "--json"))["num_changed"] == 0


@contextmanager
def _started(installed: Installed, *words: str) -> Iterator[subprocess.Popen[str]]:
    """A command that goes on until the end of the block."""
    env, mark = marked_environment(installed.environment)
    process = subprocess.Popen(
        installed.command(*words), cwd=installed.folder, env=env, stdout=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        ProcessTree(process.pid, mark).end()
        process.communicate()


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, trust_env=False, timeout=10).is_success
    except httpx.TransportError:
        return False


def test_a_stack_comes_up_stays_up_takes_deployments_trains_a_recipe_and_goes_down(installed: Installed) -> None:
    """A server and a worker that are killed come back; `down` leaves no process and no record."""
    stages = [{"kind": "sft", "max_steps": 1, "learning_rate": 1e-3}]
    write_recipe(installed.folder, stages=stages, evaluation={"limit": 2}, num_processes=1)
    try:
        up = installed.weightline("up", "--port", "0")
        assert "up: http://127.0.0.1:" in up
        record, members = _whole_stack(installed, up)
        for name in ("server", "worker"):
            os.kill(record.processes[name].pid, signal.SIGKILL)
        repaired = _repaired(installed, set(record.processes))
        assert (repaired.api_url, repaired.dashboard_url) == (record.api_url, record.dashboard_url)
        assert repaired.ui_url in installed.weightline("up")
        assert StackRecord.load(_stack_folder(installed).record_path) == repaired
        assert installed.weightline("deploy").startswith("deployed to http://127.0.0.1:")
        ran = installed.weightline("run", "recipe.yaml")
        assert "using the stack that is up" in ran
        assert "is bit-equal to what trainer.save_model wrote" in ran
        (chain,) = (path.parent for path in installed.folder.glob("runs/*/bucket/*/commits"))
        assert len(json.loads(installed.weightline("log", str(chain), "--json"))["versions"]) == 2
    finally:
        assert installed.weightline("down") == "down\n"
    assert not any(process.is_alive() for process in repaired.processes.values())
    assert not any(member.is_running() and member.status() != psutil.STATUS_ZOMBIE for member in members)
    assert not _stack_folder(installed).record_path.exists()
    assert installed.weightline("down") == "nothing was up\n"
    _serve_and_show(installed, chain)


def _stack_folder(installed: Installed) -> StackFolder:
    return StackFolder.under(installed.folder / "runs")


def _whole_stack(installed: Installed, up: str) -> tuple[StackRecord, list[psutil.Process]]:
    """The record of a stack that `up` has described, and the processes below those of the record."""
    folder = _stack_folder(installed)
    record = running_stack(folder)
    assert record is not None
    assert record.ui_url in up
    assert f"Dashboard: {record.dashboard_url}" in up
    has_database = isinstance(find_postgres(folder.root), Postgres)
    assert set(record.processes) == {
        "server", "worker", "dashboard", "supervisor", *(["database"] if has_database else []),
    }  # fmt: skip
    wait_until(lambda: _answers(f"{record.dashboard_url}/api/chains"))
    return record, [
        child for p in record.processes.values() for child in psutil.Process(p.pid).children(recursive=True)
    ]


def _repaired(installed: Installed, names: set[str]) -> StackRecord:
    """The record of the stack once all of its processes are there again."""
    folder = _stack_folder(installed)
    found = wait_until(
        lambda: running_stack(folder),
        lambda found: found is not None and set(found.processes) == names,
        told=(folder.log_dir / "supervisor.log").read_text,
    )
    assert found is not None
    return found


def _serve_and_show(installed: Installed, chain: Path) -> None:
    """An inference server and the dashboard on the chain that the recipe made."""
    with _started(installed, "dashboard", str(chain), "--port", str(free_port(0))) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        wait_until(lambda: _answers(f"{url}/api/chains"))
    address = installed.folder / "replica" / "address.json"
    with _started(
        installed, "serve", "transformers", "--follow", str(chain), "--state-dir", "replica", "--port", "0"
    ) as server:
        wait_until(lambda: address.exists() or server.poll() is not None)
        url = json.loads(address.read_text())["url"]
        wait_until(lambda: _answers(f"{url}/ready"))
        body = {"prompt": "1+2=", "max_tokens": 2, "temperature": 0}
        answer = httpx.post(f"{url}/v1/completions", json=body, timeout=PATIENCE_SECONDS, trust_env=False)
        assert answer.headers["x-weightline-version"] == "1"
