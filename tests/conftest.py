"""Hypothesis profiles, and the marks of tests: a test without one starts no process."""

from __future__ import annotations

import gc
import os
import sys
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

pytest_plugins = ["tests.prefect_server"]

# What is imported while tests are collected stays to the end: to look for garbage in it again and again costs seconds.
gc.disable()

# The Hub's client reads it once a process, when it first moves content: a cut connection is tried again soon.
os.environ.setdefault("HF_XET_CLIENT_RETRY_BASE_DELAY", "20ms")
# Processes that tests start import this repository: they compile it once, not each for itself.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

settings.register_profile("default", max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("nightly", max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))
_IS_NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"

#: Marks of tests that start processes. `make test-fast` leaves all of them out.
_MARKS = {"process", "store", "train", "flows", "browser"}
#: Fixtures that start a server, and the mark of tests that use one.
_MARK_OF_FIXTURE = {"s3_port": "store", "azure_port": "store", "hub_server": "store", "server": "flows"}
_STORES_WITH_SERVERS = {"s3", "az", "gs", "hub", "hub_s3"}

_unmarked_test: str | None = None
"""The test that runs, when it has none of `_MARKS`."""


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark tests by the servers that their fixtures start, and let one worker of xdist run all tests of a group.

    A group is a module, whose fixtures are then made once. All tests of one Prefect server are one group, and so are
    all tests whose ranks one fork server starts. Tests of the mark `nightly` are left out by day.
    """
    nightly = [] if _IS_NIGHTLY else [item for item in items if item.get_closest_marker("nightly")]
    if nightly:
        config.hook.pytest_deselected(items=nightly)
        items[:] = [item for item in items if item not in nightly]
    for item in items:
        used = set(getattr(item, "fixturenames", ()))
        for fixture in used & _MARK_OF_FIXTURE.keys():
            item.add_marker(_MARK_OF_FIXTURE[fixture])
        callspec = getattr(item, "callspec", None)
        if callspec is not None and callspec.params.get("any_url") in _STORES_WITH_SERVERS:
            item.add_marker("store")
        item.add_marker(pytest.mark.xdist_group(_group(item)))
    items.sort(key=_turn)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Fail when pytest-xdist has not seen the groups: every worker would start every server."""
    gc.freeze()
    gc.enable()
    if getattr(session.config.option, "loadgroup", False) and not all("@" in item.nodeid for item in session.items):
        raise pytest.UsageError("pytest-xdist does not know the groups of these tests: see pytest's range in pyproject")


def _group(item: pytest.Item) -> str:
    if "server" in getattr(item, "fixturenames", ()):
        return "prefect"
    if item.get_closest_marker("train") and not item.get_closest_marker("flows"):
        return "ranks"
    return item.nodeid.partition("::")[0]


def _turn(item: pytest.Item) -> int:
    """The longest groups come first, so that no worker is left with one of them at the end."""
    marks = {mark.name for mark in item.iter_markers()}
    return next((turn for turn, name in enumerate(("flows", "train", "store", "browser")) if name in marks), 4)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Any:
    """Note whether the test may start processes."""
    global _unmarked_test
    _unmarked_test = item.nodeid if _MARKS.isdisjoint(mark.name for mark in item.iter_markers()) else None
    try:
        return (yield)
    finally:
        _unmarked_test = None


def _refuse_processes(event: str, args: tuple[Any, ...]) -> None:
    """An audit hook, which Python calls before every process that is started: unmarked tests start none of ours."""
    if event == "subprocess.Popen" and _unmarked_test is not None:
        argv = args[1] if isinstance(args[1], (list, tuple)) else [args[1]]
        if any(str(part) == sys.executable for part in argv):
            raise AssertionError(f"{_unmarked_test} has none of the marks {sorted(_MARKS)} and starts {argv}")


sys.addaudithook(_refuse_processes)
