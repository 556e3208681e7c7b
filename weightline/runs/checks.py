"""Checks of form values that need the machine or the bucket. Each error begins with the name of the form's field."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from weightline.chain import Chain, open_chain
from weightline.chain.files.checkpoint import MARKER
from weightline.chain.read.refs import resolve
from weightline.errors import ChainEmptyError, Facts, InputError, WeightlineError
from weightline.files import user_path

#: Retry deadline for a bucket that a person has just named. It is short, so that a wrong address is reported soon.
PATIENCE_SECONDS = 8.0


@contextmanager
def check_form(field: str) -> Iterator[None]:
    """Adds the form's field to errors that are raised in the block: to their text and to their facts.

    A weightline error keeps its type. An OSError or ValueError becomes an InputError.
    """
    try:
        yield
    except WeightlineError as error:
        if str(error).startswith(f"{field}:"):
            raise
        facts: Facts = {**error.facts, "field": field}
        raise type(error)(f"{field}: {error}", **facts) from error
    except (OSError, ValueError) as error:
        raise InputError(f"{field}: {error}", field=field) from error


def check_chain(url: str, patience_seconds: float | None = None) -> Chain:
    """Opens a chain that holds a version. Raises ChainEmptyError, InputError or StorageError."""
    with check_form("chain"):
        chain = open_chain(url, patience_seconds=patience_seconds)
        if chain.tip_version() is None:
            raise ChainEmptyError(f"{url} holds no version: check the URL", chain=chain.url)
    return chain


def check_version(url: str, version: int) -> Chain:
    """Opens a chain that holds this version. Events lead here as well, so it has readers' usual retry deadline."""
    chain = check_chain(url)
    with check_form("version"):
        chain.header(version)
    return chain


def check_release(url: str, version: str, folder: str | None, repo_id: str | None) -> None:
    """Checks that a folder or a repository is named, and that the version exists. Publishes nothing."""
    if folder is None and repo_id is None:
        raise InputError("folder, repo_id: name a folder, a Hub repository, or both", field="folder")
    chain = check_chain(url, PATIENCE_SECONDS)
    with check_form("version"):
        resolve(chain, version)
    check_folder(folder)


def check_folder(folder: str | None) -> None:
    """Raises InputError when no new checkpoint can be written there. Creates its parent folders; safe to repeat."""
    if folder is None:
        return
    target = user_path(folder).absolute()
    with check_form("folder"):
        if target.exists() and not target.is_dir():
            raise InputError(f"{target} is a file", path=folder)
        if target.exists() and any(target.iterdir()) and not (target / MARKER).exists():
            raise InputError(f"{target} is not empty: name a new folder", path=folder)
        target.parent.mkdir(parents=True, exist_ok=True)


def check_runs_dir(folder: str) -> None:
    """Raises InputError when there is no such folder."""
    if not user_path(folder).is_dir():
        raise InputError(f"runs_dir: there is no folder {folder}", field="runs_dir")
