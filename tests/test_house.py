"""docs/design.md and the import contracts against the folders: neither leaves out a room or states another order."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from tests import ROOT

PACKAGE = ROOT / "weightline"
DESIGN = (ROOT / "docs/design.md").read_text()
#: The code blocks of "Packages and layers": the tree, then the layers.
TREE, LAYERS = re.findall(r"^```\n(.*?)^```$", DESIGN.split("## Packages and layers")[1], re.DOTALL | re.MULTILINE)[:2]
CONTRACTS: dict[str, dict[str, Any]] = {
    contract["name"]: contract
    for contract in tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
}
LAYERED = CONTRACTS["the house: imports go one way"]
#: Not among the layers: `python -m weightline`, and what ships for the tests of others.
UNLAYERED = {"__init__", "__main__", "testing"}
TOP_FOLDERS = ("flows", "tasks", "deployments")
FOLDERS = (*TOP_FOLDERS, "weightline", "tests", "infra", "benchmarks")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("**/*.md"))]


def _modules() -> set[str]:
    """What lies directly below the package: rooms and single files."""
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    return rooms | {path.stem for path in PACKAGE.glob("*.py")}


def _names(layers: list[str]) -> list[set[str]]:
    return [{name.strip().removeprefix("weightline.") for name in layer.split("|")} for layer in layers]


def _drawn() -> dict[str, int]:
    """Every folder and file of the tree by its path, with the line that it stands on."""
    found: dict[str, int] = {}
    parents: list[str] = []
    for number, line in enumerate(TREE.splitlines()):
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        parents[depth:] = [name.rstrip("/")]
        found["/".join(parents)] = number
    return found


def test_the_design_draws_the_layers_of_the_contract() -> None:
    assert _names(LAYERS.splitlines()) == _names(LAYERED["layers"])


def test_every_room_has_a_layer() -> None:
    assert set.union(*_names(LAYERED["layers"])) == _modules() - UNLAYERED


def test_every_room_is_drawn_and_what_is_drawn_is_there() -> None:
    drawn = _drawn()
    for path in drawn:
        assert (ROOT / path).exists(), f"docs/design.md draws {path}, which is not there"
    rooms = {_drawn_path(path.parent) for path in PACKAGE.glob("**/__init__.py")} - {"weightline"}
    rooms |= {_drawn_path(path.parent) for top in TOP_FOLDERS for path in (ROOT / top).glob("**/__init__.py")}
    rooms |= {f"weightline/{path.name}" for path in PACKAGE.glob("*.py") if path.stem not in UNLAYERED}
    # An engine's own room is drawn with the room of engines.
    shallow = {room for room in rooms if len(Path(room).parts) <= 3}
    assert shallow - drawn.keys() == set()


def _drawn_path(folder: Path) -> str:
    parts = folder.relative_to(ROOT).parts
    return "/".join(parts[1:] if parts[0] == "weightline" and parts[1:2] and parts[1] in TOP_FOLDERS else parts)


def test_prefect_and_torch_are_kept_out_of_every_other_room() -> None:
    everything = {f"weightline.{name}" for name in _modules() - {"__init__", "__main__"}}
    prefect = set(CONTRACTS["prefect stays in flows, tasks and deployments"]["source_modules"])
    assert everything - prefect == {f"weightline.{name}" for name in TOP_FOLDERS}
    torch = set(CONTRACTS["torch stays in the rooms that compute"]["source_modules"])
    rooms = ("codec", "evaluation", "naming", "serving", "stages", "trainer")
    assert everything - torch == {f"weightline.{name}" for name in rooms}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_are_there(page: Path) -> None:
    named = re.findall(rf"\b(?:{'|'.join(FOLDERS)})/[\w./-]+\.(?:py|md|yaml|json)\b", page.read_text())
    assert [name for name in named if not (ROOT / name).exists()] == []
