"""Runs a replica: counts its refreshes, renews its lease, and follows the chain on a thread."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from weightline.errors import CorruptError, NotFoundError, StorageError, UnsupportedFeatureError, WeightlineError
from weightline.serving.replica.following import Follower, Following, record_refresh
from weightline.serving.replica.registration import Presence, Registration
from weightline.serving.replica.replica import Replica
from weightline.serving.replica.status import RefreshFacts, ReplicaStatus

_log = logging.getLogger(__name__)
_CLOSE_SECONDS = 10.0
_PAUSE_BUCKETS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)


class ReplicaService:
    """A replica with its metrics, its lease and its follower. Call `start` and `close` once each."""

    def __init__(self, replica: Replica, following: Following | None = None, presence: Presence | None = None) -> None:
        """Creates the threads. Without a `presence` there is no lease: rollouts and gc do not see the replica."""
        self.replica = replica
        self.metrics = ReplicaMetrics(replica.name)
        self._follower = None if following is None else Follower(replica.chain, following)
        self._registration = (
            None if presence is None else Registration(replica.chain, replica.state_dir, presence, self.observe)
        )
        self._refused: int | None = None
        self._stopping = threading.Event()
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
        for thread in self._threads:
            if thread.is_alive():
                thread.join(_CLOSE_SECONDS)
        if self._registration is not None:
            # An unavailable bucket must not block the end of the process. The lease expires in that case.
            ending = threading.Thread(target=self._registration.end, name="weightline-lease-end", daemon=True)
            ending.start()
            ending.join(_CLOSE_SECONDS)

    def refresh(self, version: int | None = None, *, allow_backward: bool = False) -> RefreshFacts:
        """Does `Replica.refresh`, announces it in the lease and counts it."""
        with self._announced(None if version == self.replica.version else version):
            try:
                facts = self.replica.refresh(version, allow_backward=allow_backward)
            except WeightlineError as error:
                self.metrics.count_failure(error, self.replica.version)
                raise
            self.metrics.count_refresh(facts)
        return facts

    def status(self) -> ReplicaStatus:
        """Returns the replica's state and its lag behind the chain, which is None while the bucket fails.

        Costs one short listing and, behind the tip, one manifest. Changes nothing.
        """
        tip, status = self._tip_version(), self.replica.status()
        lag_versions = None if tip is None or status.version is None else tip - status.version
        follows = None if self._follower is None else self._follower.following.what
        lag_seconds = self._lag_seconds(tip, status.version)
        return status.model_copy(
            update={"tip_version": tip, "follows": follows, "lag_versions": lag_versions, "lag_seconds": lag_seconds}
        )

    def observe(self) -> ReplicaStatus:
        """Returns `status`, and sets the metrics of the lag by it. The lease does so at every renewal."""
        status = self.status()
        self.metrics.set_lag(status)
        return status

    def _tip_version(self) -> int | None:
        try:
            return self.replica.chain.tip_version()
        except StorageError as error:
            _log.info("the tip of %s cannot be read: %s", self.replica.chain.url, error)
            return None

    def _lag_seconds(self, tip: int | None, version: int | None) -> float | None:
        """Returns the age of the oldest version that is not served yet, by the writer's clock; 0 at the tip."""
        if tip is None or version is None:
            return None
        if version >= tip:
            return 0.0
        try:
            created_at = self.replica.chain.manifest(version + 1).created_at
        except (NotFoundError, CorruptError, StorageError) as error:
            _log.info("the lag of replica %s is unknown: %s", self.replica.name, error)
            return None
        return max(0.0, (datetime.now(UTC) - datetime.fromisoformat(created_at)).total_seconds())

    @contextmanager
    def _announced(self, version: int | None) -> Iterator[None]:
        """Announces a move to the version (None: no move) in the lease, and observes where it ended."""
        if self._registration is not None:
            with self._registration.moving(version):
                yield
            return
        yield
        self.observe()

    def _run(self) -> None:
        self._recover()
        num_failures = 0
        while self._follower is not None and not self._stopping.is_set():
            num_failures = 0 if self._follow_once(self._follower) else num_failures + 1
            self._stopping.wait(self._follower.following.wait_seconds(num_failures))

    def _recover(self) -> None:
        version = self.replica.returns_to
        try:
            with self._announced(None if version == self.replica.version else version):
                facts = self.replica.recover()
        except WeightlineError as error:
            _log.warning("replica %s cannot return to its version: %s", self.replica.name, error)
            self.metrics.count_failure(error, self.replica.version)
            return
        if facts is not None:
            self.metrics.count_refresh(facts)

    def _follow_once(self, follower: Follower) -> bool:
        """Moves to the follower's target. Returns False after a failure, which is counted and shown in `status`."""
        try:
            target = follower.target()
            if target is None or target in (self.replica.version, self._refused):
                return True
            facts = self.refresh(target, allow_backward=follower.following.ref is not None)
            record_refresh(self.replica.chain, facts.version, self.replica.name, facts)
        except UnsupportedFeatureError as error:
            # A retry cannot succeed: this engine will never serve that version, but perhaps the next one.
            _log.warning("replica %s skips version %s: %s", self.replica.name, target, error)
            self._refused = target
        except WeightlineError as error:
            _log.warning("replica %s stays at %s: %s", self.replica.name, self.replica.version, error)
            return False
        return True


class ReplicaMetrics:
    """A replica's metrics for Prometheus, in a registry of its own. Safe to use from many threads."""

    def __init__(self, replica: str) -> None:
        self.registry = CollectorRegistry()
        self._labels = {"replica": replica}
        self.version = self._gauge("version", "Version that is served; -1: none")
        self.lag_versions = self._gauge("lag_versions", "Versions between the one served and the tip, when last read")
        self.lag_seconds = self._gauge("lag_seconds", "Age of the oldest version that is not served yet; 0 at the tip")
        self.pause_seconds = self._histogram("refresh_pause_seconds", "Seconds for which a refresh paused the engine")
        self.prepare_seconds = self._histogram(
            "refresh_prepare_seconds", "Fetching, verifying and decoding, while serving"
        )
        self.payload_bytes = self._counter("refresh_payload_bytes", "Bytes of payloads that refreshes fetched")
        self.changed_elements = self._counter("refresh_changed_elements", "Elements that refreshes wrote")
        self._failures = Counter(
            "weightline_refresh_failures", "Refreshes that failed, by kind", ("replica", "kind"), registry=self.registry
        )
        self.completions = self._counter("completions", "Prompts (behind vLLM: requests) that were answered")
        self.version.set(-1)

    def count_refresh(self, facts: RefreshFacts) -> None:
        """Counts a refresh that succeeded. One that had nothing to do is not counted."""
        self.version.set(facts.version)
        if facts.from_version == facts.version:
            return
        self.pause_seconds.observe(facts.pause_seconds)
        self.prepare_seconds.observe(facts.prepare_seconds)
        self.payload_bytes.inc(facts.payload_nbytes)
        self.changed_elements.inc(facts.num_changed)

    def count_failure(self, error: WeightlineError, version: int | None) -> None:
        """Counts a refresh that failed, and sets the version that is served after it."""
        self._failures.labels(**self._labels, kind=str(error.kind)).inc()
        self.version.set(-1 if version is None else version)

    def set_lag(self, status: ReplicaStatus) -> None:
        """Sets the lag. While the bucket fails, the lag in versions is unchanged and the lag in seconds is NaN."""
        if status.tip_version is not None:
            self.lag_versions.set(status.tip_version - (-1 if status.version is None else status.version))
        self.lag_seconds.set(float("nan") if status.lag_seconds is None else status.lag_seconds)

    def render(self) -> bytes:
        """Returns the text exposition format."""
        return generate_latest(self.registry)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"weightline_replica_{name}", text, ("replica",), registry=self.registry).labels(**self._labels)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(f"weightline_{name}", text, ("replica",), registry=self.registry).labels(**self._labels)

    def _histogram(self, name: str, text: str) -> Histogram:
        family = Histogram(f"weightline_{name}", text, ("replica",), registry=self.registry, buckets=_PAUSE_BUCKETS)
        return family.labels(**self._labels)
