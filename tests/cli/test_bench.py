"""weightline bench: what is printed is measured, and what is not exact ends with an error."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from safetensors.numpy import save_file
from typer.testing import CliRunner

from tests.codec.states import RUNS, real_pairs
from weightline.bench import peers
from weightline.cli.main import app
from weightline.codec.coding import codings

pytest.importorskip("zstandard")


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two real states, as files."""
    folder: Path = tmp_path_factory.mktemp("states")
    for name, at in (("a", 1), ("b", 2)):
        save_file({pair[0].tensor.name: pair[at] for pair in real_pairs(RUNS[0])}, folder / f"{name}.safetensors")
    return [str(folder / "a.safetensors"), str(folder / "b.safetensors")]


def bench(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["bench", *arguments], catch_exceptions=False)


def test_peers_stand_beside_ours(states: list[str]) -> None:
    text = bench("peers", *states)
    assert text.exit_code == 0
    systems = [line.split()[0] for line in text.stdout.splitlines()[1:]]
    assert systems == ["TRL", "slime", "NeMo-RL", "PULSE", *["weightline"] * len(codings())]
    told = json.loads(bench("peers", *states, "--json").stdout)
    assert [row["coding"] for row in told["codings"]] == list(codings())
    assert len({row["num_changed"] for row in told["peers"] + told["codings"]}) == 1
    assert max(r["payload_nbytes"] for r in told["codings"]) < min(r["payload_nbytes"] for r in told["peers"])


def test_a_layout_that_loses_bits_is_an_error(states: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "_decode_pulse", lambda stream, old_N: np.zeros_like(old_N))
    result = bench("peers", *states)
    assert result.exit_code == 1
    assert [line.split()[-1] for line in result.stdout.splitlines()[1:]].count("False") == 1
