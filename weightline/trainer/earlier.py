"""Training again in one process: what an earlier training left behind is found, finished, and gone on from.

A notebook's cell is interrupted and run again, `auto_find_batch_size` begins anew after an out-of-memory error, or a
second trainer is made for the same model. The earlier session may still be writing a version then, and the model may
have been trained further since its last one.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any, Protocol

from weightline.trainer.writer import commit_id_of


class Endable(Protocol):
    """A publishing session, as far as a later one has to do with it."""

    @property
    def is_left(self) -> bool:
        """Whether its training has ended without closing it."""
        ...

    def finish(self) -> None:
        """Waits until what was captured is committed, and closes the session."""
        ...


@dataclass(slots=True)
class Trail:
    """What one session wrote of one model."""

    chain_url: str
    session_id: str
    start_commit_id: str | None
    """The version that it started from."""
    num_captured: int = 0
    is_complete: bool = False
    """Training came to its end: what happens to the model after that is no part of it."""

    def leads_to(self, chain_url: str, commit_id: str) -> bool:
        """Whether the version is this session's, or the one that it started from."""
        own = (commit_id_of(self.session_id, sequence) for sequence in range(self.num_captured))
        return chain_url == self.chain_url and (commit_id == self.start_commit_id or commit_id in own)


_sessions: weakref.WeakSet[Any] = weakref.WeakSet()
_trails: weakref.WeakKeyDictionary[Any, Trail] = weakref.WeakKeyDictionary()


def register(session: Endable) -> None:
    """Notes an open session."""
    _sessions.add(session)


def forget(session: Endable) -> None:
    """Says that the session is closed."""
    _sessions.discard(session)


def finish_left_sessions() -> None:
    """Finishes every open session of this process whose training has ended. PublishError when one cannot be."""
    for session in list(_sessions):
        if session.is_left:
            session.finish()


def leave_trail(model: Any, trail: Trail) -> None:
    """Notes what a session writes of the model, from now on."""
    _trails[model] = trail


def unfinished_trail(model: Any) -> Trail | None:
    """Returns what was written of the model by a training of this process that did not come to its end."""
    trail = _trails.get(model)
    return None if trail is None or trail.is_complete else trail
