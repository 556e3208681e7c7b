"""Opening the chain of a command. Every command refuses a URL without versions with the same error."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from weightline.chain import Chain


def open_existing(url: str) -> Chain:
    """Returns the chain at the URL. ChainEmptyError, with the chains below or beside it, when it holds no version."""
    from weightline.chain import open_chain
    from weightline.chain.read.discovery import empty_chain_error

    chain = open_chain(url)
    if chain.tip_version() is None:
        raise empty_chain_error(url)
    return chain
