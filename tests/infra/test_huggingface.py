"""What infra/huggingface says, as far as a machine without the Hub and without containers can tell."""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from huggingface_hub import SpaceHardware
from huggingface_hub.cli.hf import app as hf
from packaging.requirements import Requirement

from tests import ROOT
from tests.cli.test_surface import SURFACE
from tests.package.test_extras import PROJECT
from weightline.environments.word_game import game_seed
from weightline.extras import MODULES
from weightline.launch.command import accelerate_config

FOLDER = ROOT / "infra" / "huggingface"
SPACES = ("replica", "environment")
PAGE = (ROOT / "docs" / "huggingface.md").read_text()
#: Of the Space's card. https://huggingface.co/docs/hub/spaces-config-reference
COLORS = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}
INSTRUCTIONS = {"ARG", "FROM", "COPY", "RUN", "USER", "ENV", "WORKDIR", "ENTRYPOINT", "CMD"}


def _card(space: str) -> dict[str, Any]:
    card: dict[str, Any] = yaml.safe_load((FOLDER / space / "README.md").read_text().split("---\n")[1])
    return card


def _instructions(space: str) -> list[tuple[str, str]]:
    """Each instruction of a Dockerfile with its text, continued lines joined."""
    text = (FOLDER / space / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in lines]


def _started(space: str) -> list[str]:
    """The words of the command that a Space starts."""
    (command,) = (text for name, text in _instructions(space) if name == "CMD")
    words: list[str] = yaml.safe_load(command) if command.startswith("[") else shlex.split(command)
    return words[words.index("weightline") :]


@pytest.mark.parametrize("space", SPACES)
def test_a_card_has_the_fields_of_a_docker_space(space: str) -> None:
    card = _card(space)
    assert card["sdk"] == "docker"
    assert {card["colorFrom"], card["colorTo"]} <= COLORS
    assert len(card["emoji"]) == 1
    assert card.get("suggested_hardware", "cpu-basic") in {hardware.value for hardware in SpaceHardware}
    assert f"--port={card['app_port']}" in _started(space)
    assert "--host=0.0.0.0" in _started(space)


@pytest.mark.parametrize("space", SPACES)
def test_an_image_starts_what_the_command_line_knows(space: str) -> None:
    words = _started(space)
    options = {word.partition("=")[0] for word in words if word.startswith("--")}
    (line,) = (line for line in SURFACE.read_text().splitlines() if line.startswith(" ".join(words[:3])))
    assert options <= {word.rstrip("!") for word in line.split()}
    assert options


@pytest.mark.parametrize("space", SPACES)
def test_an_image_has_a_named_base_and_known_instructions_and_extras(space: str) -> None:
    instructions = _instructions(space)
    assert {name for name, _ in instructions} <= INSTRUCTIONS
    (base,) = (text.removeprefix("BASE=") for name, text in instructions if name == "ARG")
    assert re.fullmatch(r"[\w./-]+:[\w.-]+", base)
    assert not base.endswith(":latest")
    assert ("FROM", "${BASE}") in instructions
    assert [text for name, text in instructions if name == "COPY"] == ["weightline-*.whl /wheels/"]
    (extras,) = (
        re.findall(r"whl\)\[([\w,]+)\]", text) for name, text in instructions if name == "RUN" and "pip" in text
    )
    assert set(extras[0].split(",")) <= set(MODULES)


def test_the_replica_s_image_has_the_vllm_that_is_tested() -> None:
    (base,) = (text for name, text in _instructions("replica") if name == "ARG")
    (wanted,) = (Requirement(one) for one in PROJECT["optional-dependencies"]["vllm"] if one.startswith("vllm"))
    assert wanted.specifier.contains(base.rpartition(":v")[2])


def _hf_commands() -> list[list[str]]:
    """The words of each `hf` command of the page."""
    blocks = re.findall(r"^```\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.startswith("hf ")]


def test_the_page_names_every_place() -> None:
    text = "\n".join(" ".join(words) for words in _hf_commands())
    for part in ("infra/huggingface/environment", "infra/huggingface/replica", "./infra/huggingface/trainer:/trainer"):
        assert part in text
    assert sum(words[1:3] == ["jobs", "run"] for words in _hf_commands()) == 1


@pytest.mark.parametrize("words", _hf_commands(), ids=lambda words: " ".join(words[1:4]))
def test_hf_knows_each_command_of_the_page(words: list[str]) -> None:
    command: Any = hf
    rest = words[1:]
    # Groups and commands are loaded when they are asked for.
    while hasattr(command, "get_command"):
        command, rest = command.get_command(command.context_class(command), rest[0]), rest[1:]
    command = command.materialize() if hasattr(command, "materialize") else command
    known: dict[str, Any] = {name: one for one in command.params for name in (*one.opts, *one.secondary_opts)}
    image = next((at for at, word in enumerate(rest) if word.startswith("pytorch/")), len(rest))
    for at, word in enumerate(rest[:image]):
        if word.startswith("--"):
            assert word in known, words
            chosen = getattr(known[word].type, "choices", None)
            if chosen:
                assert rest[at + 1] in [getattr(one, "value", one) for one in chosen], words


def test_the_job_s_script_is_a_script_and_its_files_are_there() -> None:
    path = FOLDER / "trainer" / "start.sh"
    assert subprocess.run(["sh", "-n", str(path)], check=False).returncode == 0
    for name in re.findall(r"\$\(config ([\w.]+)\)", path.read_text()):
        assert accelerate_config(name).is_file()
    assert "/trainer/train.py" in path.read_text()


def _trainer() -> ModuleType:
    spec = importlib.util.spec_from_file_location("places_train", FOLDER / "trainer" / "train.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_trainer_s_games_differ() -> None:
    rows = _trainer().rows(64)
    assert len({game_seed(row["prompt"]) for row in rows}) == 64
    assert all(Path(FOLDER, part).is_file() for part in ("trainer/train.py", "trainer/start.sh"))
