"""Finds the versions that newer ones of their training have overtaken before work on them began.

Training with a version a step commits faster than versions are evaluated and served. So a request that a commit started
works on the newest version of its training instead of its own one, and settles all between them. Milestones are never
overtaken: each waits for its own request.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from weightline.chain.read.history import Chain
from weightline.errors import CorruptError

_logger = logging.getLogger(__name__)
#: Versions that are overtaken by one request at most, besides its own.
_MAX_OVERTAKEN = 256


@dataclass(frozen=True, slots=True)
class Overtaken:
    """Versions that are skipped for a newer one of the same training."""

    newer_version: int
    versions: tuple[int, ...]
    """The requested version first, then those between it and the newer one, ascending."""


def find_overtaken(chain: Chain, version: int) -> Overtaken | None:
    """Returns what the tip has overtaken from `version` on; None where `version` itself is to be worked on.

    That is so for the tip, for a milestone, and where the tip is of another training. Reads the headers from
    `version` to the tip, and none before. A header between them that cannot be read is left to its own request.
    VersionNotFoundError for a version that the chain does not have.
    """
    requested, tip = chain.header(version), chain.tip_version()
    if requested.is_milestone or tip is None or tip <= version or chain.header(tip).run_id != requested.run_id:
        return None
    found = [version]
    for number in range(version + 1, min(tip, version + 1 + _MAX_OVERTAKEN)):
        try:
            header = chain.header_if_kept(number)
        except CorruptError as error:
            _logger.warning("version %d is left to its own request: %s", number, error)
            continue
        if header is not None and header.run_id == requested.run_id and not header.is_milestone:
            found.append(number)
    return Overtaken(tip, tuple(found))
