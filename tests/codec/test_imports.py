"""What importing the codec costs: a command line that only prints its help must not wait for a compiler."""

from __future__ import annotations

import pkgutil
import subprocess
import sys

import pytest

import weightline.codec

MODULES = sorted(
    f"weightline.codec.{module.name}"
    for module in pkgutil.iter_modules(weightline.codec.__path__)
    if module.name not in ("kernels", "torch_ops")
)


@pytest.mark.process
def test_no_module_of_the_codec_imports_numba_or_torch() -> None:
    imports = "; ".join(
        f"import {name}"
        for name in (*MODULES, "weightline.format.payload", "weightline.bench.codings", "weightline.bench.peers")
    )
    script = f"import sys; {imports}; print([name for name in ('numba', 'torch', 'zstandard') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert len(MODULES) > 10
