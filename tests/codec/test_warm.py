"""Kernels that are compiled ahead."""

from __future__ import annotations

import subprocess
import sys

import pytest

_PROGRAM = """
import importlib, pkgutil
from numba.core.dispatcher import Dispatcher
from weightline.codec import kernels
from weightline.codec.warm import warm

warm(["BF16", "F32"])
for found in pkgutil.iter_modules(kernels.__path__):
    module = importlib.import_module(f"weightline.codec.kernels.{found.name}")
    for name, kernel in vars(module).items():
        is_own = isinstance(kernel, Dispatcher) and kernel.py_func.__module__ == module.__name__ and name[0] != "_"
        if is_own and not kernel.targetoptions.get("forceinline") and not kernel.signatures:
            print(found.name, name)
"""


@pytest.mark.process
def test_every_kernel_is_compiled() -> None:
    done = subprocess.run([sys.executable, "-c", _PROGRAM], capture_output=True, text=True, check=True)
    # Other kernels alone call these. Whether numba loads them as well depends on what it has on disk.
    assert set(done.stdout.splitlines()) <= {"geometric next_mean", "scan find_frequent"}
