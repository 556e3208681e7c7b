"""What is used of Prefect and not documented by it: each name exists, and one module alone imports such names."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

from tests import ROOT

PRIVATE_NAMES = [
    ("prefect.context", "hydrated_context"),
    ("prefect.context", "SyncClientContext"),
    ("prefect.context", "refresh_global_settings_context"),
    ("prefect.events.related", "RESOURCE_CACHE"),
    ("prefect.events.worker", "EventsWorker"),
    ("prefect.events.worker", "EventsWorker.drain_all"),
    ("prefect.events.worker", "EventsWorker.set_client_override"),
    ("prefect.events.worker", "ProcessPoolForwardingEventsClient"),
]
#: Modules of Prefect whose names are not for users, beside those with an underscore.
PRIVATE_MODULES = ("prefect.events.related", "prefect.events.worker", "prefect.flow_engine", "prefect.utilities")
PRIVATE_FILE = ROOT / "deployments" / "prefect_private.py"
SOURCES = sorted(path for room in ("flows", "tasks", "deployments") for path in (ROOT / room).rglob("*.py"))


@pytest.mark.parametrize(("module", "name"), PRIVATE_NAMES)
def test_the_installed_prefect_has_each_private_name(module: str, name: str) -> None:
    found: object = importlib.import_module(module)
    for part in name.split("."):
        assert hasattr(found, part), (
            f"Prefect {version('prefect')} has no {module}.{name}: find what took its place for {PRIVATE_FILE}"
        )
        found = getattr(found, part)


def test_one_module_alone_imports_what_prefect_keeps_private() -> None:
    users = {path for path in SOURCES for module, name in _imports(path) if _is_private(module, name)}
    assert users == {PRIVATE_FILE}


def test_every_private_import_is_named_here() -> None:
    imported = {found for found in _imports(PRIVATE_FILE) if _is_private(*found)}
    assert imported == {(module, name) for module, name in PRIVATE_NAMES if "." not in name}


def _imports(path: Path) -> Iterator[tuple[str, str]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("prefect"):
            yield from ((node.module or "", alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names if alias.name.startswith("prefect"))


def _is_private(module: str, name: str) -> bool:
    return (
        (module, name) in PRIVATE_NAMES
        or any(part.startswith("_") for part in (*module.split(".")[1:], name))
        or any(module == one or module.startswith(f"{one}.") for one in PRIVATE_MODULES)
    )
