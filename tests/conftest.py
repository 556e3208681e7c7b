"""Hypothesis profiles, and what every room's tests share."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

pytest_plugins = ["tests.prefect_server"]

# The Hub's client reads it once a process, when it first moves content: a cut connection is tried again soon.
os.environ.setdefault("HF_XET_CLIENT_RETRY_BASE_DELAY", "20ms")

_COMMON = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("default", _COMMON, max_examples=50, stateful_step_count=15)
settings.register_profile("nightly", _COMMON, max_examples=1000, stateful_step_count=50)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))
