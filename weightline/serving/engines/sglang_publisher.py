"""A publisher: keeps SGLang's folder up with a chain, and says in a lease which versions it still needs."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from weightline.chain import Chain
from weightline.errors import WeightlineError
from weightline.format.keys import checked_name
from weightline.serving.engines.sglang import newest_published, publish_up_to
from weightline.serving.http.server import own_folder
from weightline.serving.replica.facts import ReplicaStatus
from weightline.serving.replica.following import Following
from weightline.serving.replica.registration import Presence, Registration

_log = logging.getLogger(__name__)
#: Below the published folder: the lock, and who holds the lease.
STATE_FOLDER = ".publisher"


class Publisher:
    """One of a folder. `told` hears of every folder that is new."""

    def __init__(
        self, chain: Chain, source_dir: Path, name: str, told: Callable[[Path], object], *, is_full: bool = False
    ) -> None:
        self._chain, self._source_dir, self._told, self._is_full = chain, source_dir, told, is_full
        self._name = checked_name(name)
        self._last_error: WeightlineError | None = None

    def run(self, following: Following | None) -> None:
        """Publish up to the tip; then, when `following`, again and again, also after an error, which is logged.

        InputError when another publisher has the folder or the name. Without `following` any error is raised.
        """
        state_dir = self._source_dir / STATE_FOLDER
        with own_folder(state_dir), self._registered(state_dir) as registration:
            num_failures = 0
            while True:
                num_failures = 0 if self._publish(registration, raises=following is None) else num_failures + 1
                if following is None:
                    return
                time.sleep(following.wait_seconds(num_failures))

    def status(self) -> ReplicaStatus:
        """What the lease says: garbage collection keeps the newest published version, and what follows it."""
        version = newest_published(self._source_dir)
        return ReplicaStatus(
            replica=self._name,
            chain=self._chain.url,
            engine="sglang-files",
            state="waiting" if version is None else "serving",
            version=version,
            commit_id=None,
            served_at=None,
            last_error=None if self._last_error is None else str(self._last_error),
        )

    def _publish(self, registration: Registration, *, raises: bool) -> bool:
        """False after an error."""
        try:
            self._publish_all(registration)
        except WeightlineError as error:
            if raises:
                raise
            _log.warning("%s is not published further: %s", self._source_dir, error)
            self._last_error = error
            return False
        self._last_error = None
        return True

    def _publish_all(self, registration: Registration) -> None:
        tip = self._chain.tip_version()
        if tip is None or tip == newest_published(self._source_dir):
            return
        with registration.moving(tip):
            for folder in publish_up_to(self._chain, tip, self._source_dir, is_full=self._is_full):
                self._told(folder)

    @contextmanager
    def _registered(self, state_dir: Path) -> Iterator[Registration]:
        """The lease, renewed from a thread of its own while versions are published."""
        registration = Registration(self._chain, state_dir, Presence(), self.status)
        registration.claim()
        is_over = threading.Event()
        renewing = threading.Thread(
            target=registration.renew_until, args=(is_over,), name="weightline-lease", daemon=True
        )
        renewing.start()
        try:
            yield registration
        finally:
            is_over.set()
            renewing.join()
            registration.end()
