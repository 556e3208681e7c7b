"""The wheel of this checkout, and an environment in which it is installed as a user has it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

from tests import ROOT

#: What the wheel is built from. Nothing else of the repository is copied.
_SOURCES = ("weightline", "flows", "tasks", "deployments", "infra/accelerate", "pyproject.toml", "README.md", "LICENSE")
#: Folders of these names break a program that imports something of its own by a name that is not its own.
DECOYS = ("flows", "tasks", "deployments", "infra", "tests", "benchmarks")
_PATIENCE_SECONDS = 550.0


@dataclass(frozen=True)
class Installed:
    """A Python environment that has the wheel, and a working directory that has decoys and no checkout."""

    python: Path
    folder: Path

    @property
    def site_packages(self) -> Path:
        (found,) = self.python.parents[1].glob("lib/python3*/site-packages")
        return found

    @property
    def environment(self) -> dict[str, str]:
        """That of this process, without what leads back to the checkout or to a server."""
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("PYTHON", "PREFECT", "WEIGHTLINE"))
        }
        return {**kept, "PATH": f"{self.python.parent}{os.pathsep}{kept['PATH']}", "OMP_NUM_THREADS": "1"}

    def command(self, *words: str) -> list[str]:
        """The installed `weightline` with these words."""
        return [str(self.python.with_name("weightline")), *words]

    def run(self, *argv: str) -> str:
        """Runs a command in the folder and returns its standard output. The test fails when the command does."""
        done = subprocess.run(
            argv, cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=_PATIENCE_SECONDS,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, (
            f"{argv} ended with {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        )
        return done.stdout

    def weightline(self, *words: str) -> str:
        """Runs the installed command and returns its standard output."""
        return self.run(*self.command(*words))


def build_wheel(folder: Path) -> Path:
    """Builds the wheel of this checkout without a network, in a copy, so that no build folder is left in it."""
    source = folder / "source"
    for name in _SOURCES:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source / name)
    argv = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-cache-dir"]
    subprocess.run([*argv, "--disable-pip-version-check", "--wheel-dir", str(folder), str(source)], check=True)
    (wheel,) = folder.glob("weightline-*.whl")
    return wheel


def install(wheel: Path, folder: Path) -> Installed:
    """Installs the wheel into a new environment that sees this environment's other packages, but not the checkout."""
    venv.create(folder / "environment", with_pip=False, symlinks=True)
    working = folder / "working"
    for decoy in DECOYS:
        (working / decoy).mkdir(parents=True)
        (working / decoy / "__init__.py").write_text(f"raise RuntimeError('the decoy {decoy} was imported')\n")
    installed = Installed(folder / "environment" / "bin" / "python", working)
    argv = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(installed.python),
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
    ]
    subprocess.run([*argv, "--disable-pip-version-check", str(wheel)], check=True)
    _copy_compiled_kernels(installed)
    # A line of a .pth file becomes an entry of sys.path. The .pth files in there, which lead to the checkout, are not
    # read.
    packages = [path for path in sys.path if path.endswith("site-packages")]
    (installed.site_packages / "others.pth").write_text("".join(f"{path}\n" for path in packages))
    return installed


def _copy_compiled_kernels(installed: Installed) -> None:
    """Copies the machine code of this checkout's kernels, whose compilation would take the first process a minute.

    numba takes it for a source file of the same size and time.
    """
    kernels = Path("weightline", "codec", "kernels")
    for source in (ROOT / kernels).glob("*.py"):
        copy = installed.site_packages / kernels / source.name
        os.utime(copy, ns=(source.stat().st_atime_ns, source.stat().st_mtime_ns))
    for compiled in (ROOT / kernels / "__pycache__").glob("*.nb?"):
        shutil.copy2(compiled, installed.site_packages / kernels / "__pycache__" / compiled.name)
