"""What only the machine can know of a form's values: checked first, and told with the field's name. Free of Prefect."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from weightline.chain import Chain, open_chain
from weightline.chain.files.checkpoint import MARKER
from weightline.errors import ChainEmptyError, InputError, WeightlineError

#: How long a bucket is asked that a person has just named: a wrong address is told soon.
PATIENCE_SECONDS = 8.0


@contextmanager
def check_form(field: str) -> Iterator[None]:
    """Tell what goes wrong in here by the field of the form that it comes from, as the same kind of error.

    What is no error of ours (a path that cannot be, a value that cannot be parsed) becomes an InputError.
    """
    try:
        yield
    except WeightlineError as error:
        if str(error).startswith(f"{field}:"):
            raise
        raise type(error)(f"{field}: {error}", **{**error.facts, "field": field}) from error
    except (OSError, ValueError) as error:
        raise InputError(f"{field}: {error}", field=field) from error


def check_chain(url: str, patience_seconds: float | None = None) -> Chain:
    """The chain, which holds a version. ChainEmptyError, InputError or StorageError, each with the field."""
    with check_form("chain"):
        chain = open_chain(url, patience_seconds=patience_seconds)
        if chain.tip_version() is None:
            raise ChainEmptyError(f"{url} holds no version: is the URL right?", chain=chain.url)
    return chain


def check_version(url: str, version: int) -> Chain:
    """The chain, which holds this version. Events start this, too: it waits for a bucket as long as any reader."""
    chain = check_chain(url)
    with check_form("version"):
        chain.manifest(version)
    return chain


def check_folder(folder: str | None) -> None:
    """InputError where no new checkpoint can be. What is above the folder is made now; safe to repeat."""
    if folder is None:
        return
    target = Path(folder).expanduser().absolute()
    with check_form("folder"):
        if target.exists() and not target.is_dir():
            raise InputError(f"{target} is a file", path=folder)
        if target.exists() and any(target.iterdir()) and not (target / MARKER).exists():
            raise InputError(f"{target} is not empty: name a new folder", path=folder)
        target.parent.mkdir(parents=True, exist_ok=True)


def check_runs_dir(folder: str) -> None:
    """InputError where there is no such folder."""
    if not Path(folder).expanduser().is_dir():
        raise InputError(f"runs_dir: there is no folder {folder}", field="runs_dir")
