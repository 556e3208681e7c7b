"""Compiled loops. Importing a module of this package imports numba: do so inside functions, at the first need.

Every kernel has a plain counterpart in weightline/codec/reference.py, which the tests compare with bit by bit. Kernels
are cached on disk beside this file (or under NUMBA_CACHE_DIR) and release the interpreter lock, so threads scale.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba

Function = TypeVar("Function", bound=Callable[..., Any])


def jit(function: Function) -> Function:
    """Compile at the first call, keep the machine code on disk, run without the interpreter lock."""
    return cast("Function", numba.njit(cache=True, nogil=True, error_model="numpy")(function))


def inlined(function: Function) -> Function:
    """As `jit`, for a part of a kernel's innermost loop: compiled into each caller, where its constants fold in."""
    return cast("Function", numba.njit(nogil=True, error_model="numpy", forceinline=True)(function))
