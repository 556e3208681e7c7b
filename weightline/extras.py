"""Optional dependencies: the modules of each extra of the package, and the error that names the extra to install.

`pip install weightline` reads, commits, pulls and verifies chains. A subpackage that needs more calls `check_installed`
before it begins, or wraps its imports in `requires` if a user may have installed only a part of an extra.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from weightline.errors import MissingExtraError

#: Top-level modules that weightline itself imports, by the extra whose packages they belong to.
MODULES: dict[str, tuple[str, ...]] = {
    "train": (
        "accelerate",
        "datasets",
        "deepspeed",
        "httpx",
        "psutil",
        "torch",
        "transformers",
        "trl",
        "websockets",
    ),
    "prefect": ("httpx", "prefect", "psutil"),
    "eval": ("datasets", "lm_eval", "torch", "transformers"),
    "serve": ("fastapi", "httpx", "prometheus_client", "torch", "transformers", "uvicorn"),
    "front": ("fastapi", "httpx", "prometheus_client", "uvicorn"),
    "vllm": ("httpx", "prometheus_client", "vllm"),
    "dashboard": ("fastapi", "uvicorn"),
    "environment": ("openenv", "uvicorn", "websockets"),
    "sign": ("cryptography",),
    "openlineage": ("openlineage",),
}


def check_installed(*extras: str) -> None:
    """Raises MissingExtraError when a module of these extras is not installed. Imports none of them."""
    missing = {extra: [module for module in MODULES[extra] if not _is_installed(module)] for extra in extras}
    incomplete = [extra for extra, modules in missing.items() if modules]
    if incomplete:
        raise _missing({module for modules in missing.values() for module in modules}, incomplete)


@contextmanager
def requires(extra: str) -> Iterator[None]:
    """Raises MissingExtraError when an import in the block fails because a module of this extra is not installed."""
    try:
        yield
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        if module not in MODULES[extra]:
            raise
        raise _missing([module], [extra]) from error


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    # A module that an earlier import has left partly initialized, or that a finder refuses, cannot be imported either.
    except (ModuleNotFoundError, ValueError):
        return False


def _missing(modules: Iterable[str], extras: Iterable[str]) -> MissingExtraError:
    *others, last = sorted(modules)
    names = f"{', '.join(others)} and {last} are" if others else f"{last} is"
    remedy = f"pip install 'weightline[{','.join(extras)}]'"
    return MissingExtraError(f"{names} not installed: {remedy}", modules=[*others, last], extras=list(extras))
