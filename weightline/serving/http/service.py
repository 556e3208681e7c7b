"""Runs a replica: counts its refreshes, renews its lease, and follows the chain on a thread."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

from weightline.errors import InputError, NotFoundError, UnsupportedFeatureError, WeightlineError
from weightline.format.manifest import parse_time
from weightline.serving.http.metrics import ReplicaMetrics
from weightline.serving.replica.following import Follower, Following, record_refresh
from weightline.serving.replica.registration import Presence, Registration
from weightline.serving.replica.replica import Replica
from weightline.serving.replica.status import RefreshFacts, ReplicaStatus, ServedVersion, error_text

_log = logging.getLogger(__name__)
_CLOSE_SECONDS = 10.0
#: How often a replica that follows nothing tries again to return to its last version.
_RECOVERY = Following(5.0)


class ReplicaService:
    """A replica with its metrics, its lease and its follower. Call `start` and `close` once each."""

    def __init__(self, replica: Replica, following: Following | None = None, presence: Presence | None = None) -> None:
        """Creates the threads. Without a `presence` there is no lease: rollouts and gc do not see the replica."""
        self.replica = replica
        self.metrics = ReplicaMetrics(replica.name)
        self._follower = None if following is None else Follower(replica.chain, following)
        self._registration = (
            None
            if presence is None
            else Registration(
                replica.chain, replica.state_dir, presence, self.observe, self.metrics.count_lease_failure
            )
        )
        self._refused: int | None = None
        self._moving_to: int | None = None
        self._follow_error: str | None = None
        self._last_refresh: RefreshFacts | None = None
        self._newest_tip = -1
        """The newest tip that was seen, by which a move to a version is a move to the tip."""
        self._unrecorded: list[RefreshFacts] = []
        self._stopping, self._is_work_waiting = threading.Event(), threading.Event()
        self._threads = [threading.Thread(target=self._run, name="weightline-follower", daemon=True)]
        if self._registration is not None:
            renew = self._registration.renew_until
            self._threads.append(
                threading.Thread(target=renew, args=(self._stopping,), name="weightline-lease", daemon=True)
            )

    def start(self) -> None:
        """Claims the replica's name, then, in the background, returns to its last version and follows the chain.

        InputError when another live replica has the name.
        """
        if self._registration is not None:
            self._registration.moving_to = self.replica.returns_to
            self._registration.claim()
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Ends the threads, after the refresh that they may be in, and the lease. Waits 10 s at most for each."""
        self._stopping.set()
        self._is_work_waiting.set()
        if self._registration is not None:
            self._registration.wake()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(_CLOSE_SECONDS)
        if self._registration is not None:
            # An unavailable bucket must not block the end of the process. The lease expires in that case.
            ending = threading.Thread(target=self._registration.end, name="weightline-lease-end", daemon=True)
            ending.start()
            ending.join(_CLOSE_SECONDS)

    def refresh(self, version: int | None = None, *, allow_backward: bool = False) -> RefreshFacts:
        """Does `Replica.refresh`, announces it in the lease and counts it.

        The move of a replica that follows its chain is recorded afterwards, as one that it made by itself.
        """
        facts = self._refresh(version, allow_backward=allow_backward)
        if self._follower is not None and facts.from_version != facts.version:
            self._unrecorded.append(facts)
            self._is_work_waiting.set()
        return facts

    def _refresh(self, version: int | None, *, allow_backward: bool) -> RefreshFacts:
        with self._announced(None if version == self.replica.version else version):
            try:
                facts = self.replica.refresh(version, allow_backward=allow_backward)
            except WeightlineError as error:
                self.metrics.count_failure(error, self.replica.version)
                raise
            self._report(facts)
        return facts

    def _report(self, facts: RefreshFacts) -> None:
        self.metrics.count_refresh(facts)
        if facts.from_version == facts.version:
            return
        self._last_refresh = facts
        _log.info(
            "replica %s moved from %s to version %s: %s elements, %s bytes, paused %.3f s",
            self.replica.name, "nothing" if facts.from_version is None else f"version {facts.from_version}",
            facts.version, facts.num_changed, facts.payload_nbytes, facts.pause_seconds,
        )  # fmt: skip

    def status(self) -> ReplicaStatus:
        """Returns the replica's state and its lag behind the chain, which is None while the bucket fails.

        Costs one short listing and, behind the tip, one manifest. Changes nothing.
        """
        tip, status = self._tip_version(), self.replica.status()
        lag_versions = None if tip is None or status.version is None else tip - status.version
        follows = None if self._follower is None else self._follower.following.what
        lag_seconds = self._lag_seconds(tip, status.version)
        lease_error = None if self._registration is None else self._registration.last_error
        return status.model_copy(
            update={
                "tip_version": tip, "follows": follows, "lag_versions": lag_versions, "lag_seconds": lag_seconds,
                "follow_error": self._follow_error, "lease_error": lease_error, "last_refresh": self._last_refresh,
            }
        )  # fmt: skip

    def served_version(self) -> ServedVersion:
        """Returns the version that is served now. Reads no bucket."""
        status = self.replica.status()
        last_error = status.last_error or self._follow_error
        return ServedVersion(
            version=status.version, commit_id=status.commit_id, moving_to=self._moving_to, last_error=last_error
        )

    def observe(self) -> ReplicaStatus:
        """Returns `status`, and sets the metrics of the lag by it. The lease does so at every renewal."""
        status = self.status()
        self.metrics.set_lag(status)
        return status

    # The lease carries what these two return. It must be renewed whatever they meet, so they raise nothing.
    def _tip_version(self) -> int | None:
        try:
            tip = self.replica.chain.tip_version()
            self._newest_tip = max(self._newest_tip, -1 if tip is None else tip)
            return tip
        except WeightlineError as error:
            _log.info("the tip of %s cannot be read: %s", self.replica.chain.url, error)
        except Exception:  # noqa: BLE001 - logged with its traceback
            _log.exception("the tip of %s cannot be read", self.replica.chain.url)
        return None

    def _lag_seconds(self, tip: int | None, version: int | None) -> float | None:
        """Returns the age of the oldest version that is not served yet, by the writer's clock; 0 at the tip.

        None where it is unknown: the manifest cannot be read, or its `created_at` is not a time.
        """
        if tip is None or version is None:
            return None
        if version >= tip:
            return 0.0
        try:
            created_at = parse_time(self.replica.chain.header(version + 1).created_at)
        except WeightlineError as error:
            _log.info("the lag of replica %s is unknown: %s", self.replica.name, error)
        except Exception:  # noqa: BLE001 - logged with its traceback
            _log.exception("the lag of replica %s is unknown", self.replica.name)
        else:
            return None if created_at is None else max(0.0, (datetime.now(UTC) - created_at).total_seconds())
        return None

    @contextmanager
    def _announced(self, version: int | None) -> Iterator[None]:
        """Announces a move to the version (None: no move) in the lease, and observes where it ended."""
        self._moving_to = version
        try:
            if self._registration is None:
                yield
            else:
                with self._registration.moving(version, is_tip=self._is_next_tip(version)):
                    yield
        finally:
            self._moving_to = None
        if self._registration is None:
            self.observe()

    def _is_next_tip(self, version: int | None) -> bool:
        """Returns whether a move leads forward to the tip, as far as was seen here. None is the tip, or no move."""
        held = self.replica.version
        return held is not None and (version is None or (version > held and version >= self._newest_tip))

    def _run(self) -> None:
        """Returns to the last version and follows the chain until the service closes. No error ends it.

        A replica that follows nothing tries to return to its last version until it holds one.
        """
        is_settled, num_failures = self._recover(), 0
        while not self._stopping.is_set():
            if self._follower is None:
                if is_settled:
                    return
                num_failures += 1
                if not self._stopping.wait(_RECOVERY.wait_seconds(num_failures)):
                    is_settled = self._recover()
                continue
            num_failures = 0 if self._follow_once(self._follower) else num_failures + 1
            self._wait_and_record(self._follower.following.wait_seconds(num_failures))

    def _wait_and_record(self, seconds: float) -> None:
        """Waits until the next look for a version is due, and records the moves that were requested meanwhile."""
        deadline = time.monotonic() + seconds
        while not self._stopping.is_set() and self._is_work_waiting.wait(max(0.0, deadline - time.monotonic())):
            self._is_work_waiting.clear()
            while self._unrecorded:
                self._record(self._unrecorded.pop(0))

    def _record(self, facts: RefreshFacts) -> None:
        """Writes the record of a move. A failure is logged: the moves that follow do not depend on it."""
        try:
            record_refresh(self.replica.chain, facts.version, self.replica.name, facts)
        except WeightlineError as error:
            _log.warning("replica %s cannot record its move to version %s: %s", self.replica.name, facts.version, error)
        except Exception:  # noqa: BLE001 - logged with its traceback
            _log.exception("replica %s cannot record its move to version %s", self.replica.name, facts.version)

    def _recover(self) -> bool:
        """Loads the version that was served before the start. Returns False where another try may succeed."""
        version = self.replica.returns_to
        try:
            with self._announced(None if version == self.replica.version else version):
                facts = self.replica.recover()
        except WeightlineError as error:
            _log.warning("replica %s cannot return to version %s: %s", self.replica.name, version, error)
            self.metrics.count_failure(error, self.replica.version)
            is_final = isinstance(error, InputError | NotFoundError | UnsupportedFeatureError)
        except Exception as error:  # noqa: BLE001 - logged with its traceback
            _log.exception("replica %s cannot return to version %s", self.replica.name, version)
            self.metrics.count_failure(error, self.replica.version)
            is_final = False
        else:
            if facts is not None:
                self._report(facts)
            return True
        if self._registration is not None and not is_final:
            # The version is needed until the next try: garbage collection reads it in the lease.
            self._registration.moving_to = self.replica.returns_to
        return is_final

    def _follow_once(self, follower: Follower) -> bool:
        """Moves to the follower's target. Returns False after a failure, which is counted and shown in `status`."""
        try:
            self._move_to(follower.target(), follower)
        except WeightlineError as error:
            _log.warning("replica %s stays at %s: %s", self.replica.name, self.replica.version, error)
            self._count_follow_failure(error)
        except Exception as error:  # noqa: BLE001 - logged with its traceback
            _log.exception("replica %s stays at %s", self.replica.name, self.replica.version)
            self._count_follow_failure(error)
        else:
            self._follow_error = None
            return True
        return False

    def _count_follow_failure(self, error: Exception) -> None:
        self.metrics.count_follow_failure(error)
        self._follow_error = error_text(error)

    def _move_to(self, target: int | None, follower: Follower) -> None:
        if target is None or target in (self.replica.version, self._refused):
            return
        try:
            facts = self._refresh(target, allow_backward=follower.following.ref is not None)
            record_refresh(self.replica.chain, facts.version, self.replica.name, facts)
        except UnsupportedFeatureError as error:
            # A retry cannot succeed: this engine will never serve that version, but perhaps the next one.
            _log.warning("replica %s skips version %s: %s", self.replica.name, target, error)
            self._refused = target
