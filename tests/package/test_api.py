"""The names that programs import from `weightline`: which there are, and that importing the package costs nothing."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import weightline

#: A name that is gone breaks programs. A new one is a decision: add it here and to docs/stability.md.
PUBLIC = [
    "ApplyError", "Chain", "ChainRollouts", "ConflictError", "CorruptError", "InputError", "Manifest", "NotFoundError",
    "PublishError", "PublishSettings", "Replica", "StorageError", "WeightlineCallback", "WeightlineError",
    "__version__", "commit_folder", "commit_fork", "commit_revert", "diff_versions", "move_ref", "open_chain",
    "open_store", "read_state", "resolve", "verify_chain", "write_checkpoint",
]  # fmt: skip


def test_the_public_names_are_those_that_were_decided() -> None:
    assert weightline.__all__ == PUBLIC
    assert set(PUBLIC) <= set(dir(weightline))


#: Keywords of the callback, in order. One that is gone breaks programs, as a name does.
CALLBACK_KEYWORDS = [
    "stage", "run_id", "sync_steps", "coding", "dtype", "max_in_flight", "on_backlog", "on_publish_error",
    "anchor_policy", "timeout_seconds", "close_seconds", "provenance", "step_observer",
]  # fmt: skip


def test_the_settings_of_the_callback_are_those_that_were_decided() -> None:
    chain_url, *keywords = list(inspect.signature(weightline.WeightlineCallback).parameters.values())
    assert chain_url.name == "chain_url"
    assert [keyword.name for keyword in keywords] == CALLBACK_KEYWORDS
    assert all(keyword.default is not inspect.Parameter.empty for keyword in keywords)
    # Each is a setting of the same name.
    assert {field.name for field in dataclasses.fields(weightline.PublishSettings)} == set(CALLBACK_KEYWORDS)


def _imports_for_type_checkers() -> dict[str, str]:
    """The module that each name comes from, as type checkers read it."""
    tree = ast.parse(Path(weightline.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and isinstance(node.test, ast.Name))
    return {
        alias.name: node.module or "" for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }


def test_type_checkers_and_the_interpreter_find_the_same_objects() -> None:
    homes = _imports_for_type_checkers()
    assert sorted(homes) == sorted(set(PUBLIC) - {"__version__"})
    for name, module in homes.items():
        assert getattr(weightline, name) is getattr(importlib.import_module(module), name)


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = weightline.nothing  # type: ignore[attr-defined]


@pytest.mark.process
def test_importing_the_package_imports_only_the_standard_library() -> None:
    program = (
        "import sys; before = set(sys.modules); import weightline; "
        "print(sorted({name.partition('.')[0] for name in set(sys.modules) - before} - sys.stdlib_module_names))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "['weightline']\n"


def test_the_page_on_stability_lists_every_public_name() -> None:
    page = (Path(__file__).parents[2] / "docs" / "stability.md").read_text()
    assert [name for name in PUBLIC if f"`{name}`" not in page] == []
