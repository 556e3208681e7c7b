"""A replica at work: refreshes that are counted, and a thread that follows the chain by itself."""

from __future__ import annotations

import logging
import threading

from weightline.errors import ChainEmptyError, StorageError, WeightlineError
from weightline.receiver.facts import RefreshFacts
from weightline.receiver.metrics import ReplicaMetrics
from weightline.receiver.replica import Replica

_log = logging.getLogger(__name__)
_CLOSE_SECONDS = 10.0


class ReplicaService:
    """What the door and the follower share. `start` and `close` once each."""

    def __init__(self, replica: Replica, follow_seconds: float | None = None) -> None:
        self.replica = replica
        self.metrics = ReplicaMetrics(replica.name)
        self._follow_seconds = follow_seconds
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="weightline-follower", daemon=True)

    def start(self) -> None:
        """Come back to where the replica was, in the background, then follow the chain if asked to."""
        self._thread.start()

    def close(self) -> None:
        """End the thread after the refresh that it may be in; not waited for beyond some seconds."""
        self._stopping.set()
        self._thread.join(_CLOSE_SECONDS)

    def refresh(self, version: int | None = None, *, allow_backward: bool = False) -> RefreshFacts:
        """`Replica.refresh`, counted."""
        try:
            facts = self.replica.refresh(version, allow_backward=allow_backward)
        except WeightlineError as error:
            self.metrics.observe_failure(error, self.replica.version)
            raise
        self.metrics.observe_refresh(facts)
        self.tip_version()
        return facts

    def tip_version(self) -> int | None:
        """The chain's tip for status and metrics; None also when the bucket cannot say."""
        try:
            tip = self.replica.chain.tip_version()
        except StorageError:
            return None
        self.metrics.observe_tip(tip, self.replica.version)
        return tip

    def _run(self) -> None:
        try:
            facts = self.replica.recover()
        except WeightlineError as error:
            _log.warning("replica %s cannot come back to its version: %s", self.replica.name, error)
            self.metrics.observe_failure(error, self.replica.version)
        else:
            if facts is not None:
                self.metrics.observe_refresh(facts)
        while self._follow_seconds is not None and not self._stopping.is_set():
            self._follow_once()
            self._stopping.wait(self._follow_seconds)

    def _follow_once(self) -> None:
        """A failure is counted and told in `status`; the next round tries again."""
        try:
            self.refresh()
        except ChainEmptyError:
            return
        except WeightlineError as error:
            _log.warning("replica %s stays at %s: %s", self.replica.name, self.replica.version, error)
