"""Two trainings of one chain never overlap on one host, and a killed one holds nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT
from tests.runs.recipes import write_recipe
from weightline.errors import InputError
from weightline.runs.lock import exclusive_training_lock, lock_path
from weightline.runs.prepare import prepare_run

_HOLDER = (
    "import sys; from weightline.runs.lock import exclusive_training_lock\n"
    "with exclusive_training_lock(sys.argv[1], 'other'): print('held', flush=True); sys.stdin.read()"
)


@pytest.fixture
def chain(tmp_path: Path) -> str:
    return (tmp_path / "chain").as_uri()


@pytest.mark.process
def test_the_second_training_is_refused_until_the_first_has_gone_however_it_went(chain: str) -> None:
    argv = [sys.executable, "-c", _HOLDER, chain]
    holder = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT)
    assert holder.stdout is not None
    assert holder.stdin is not None
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(InputError, match=r"^chain: .* is being trained by run other \(process \d+\)"):
        with exclusive_training_lock(chain + "/", "mine"):
            raise AssertionError("two trainings of one chain")
    with exclusive_training_lock(chain + "2", "mine"):
        pass
    holder.kill()
    holder.wait()
    holder.stdin.close()
    holder.stdout.close()
    with exclusive_training_lock(chain, "mine"):
        assert "run mine" in lock_path(chain).with_suffix(".holder").read_text()


@pytest.mark.parametrize(
    "spelling",
    [
        "{folder}", "chain", "./chain/", "../{parent}/chain", "file://{folder}/", "file://localhost{folder}",
        "file:///{folder}", "file://{folder}/../chain", "file://{escaped}", "link", "{folder}//",
    ],
)  # fmt: skip
def test_a_chain_has_one_lock_and_one_url_however_it_is_spelled(
    spelling: str, chain: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "chain"
    (tmp_path / "link").symlink_to(folder)
    escaped = str(folder).replace("chain", "%63hain")
    spelled = spelling.format(folder=folder, parent=tmp_path.name, escaped=escaped)
    assert spelled != chain
    with exclusive_training_lock(spelled, "first"):
        with pytest.raises(InputError, match="is being trained by run first"), exclusive_training_lock(chain, "second"):
            raise AssertionError("two trainings of one chain")
    assert prepare_run(write_recipe(tmp_path), tmp_path / "runs", chain_url=spelled).chain_url == chain
