"""A replica at work: refreshes that are counted, a lease that is renewed, a thread that follows the chain by itself."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from weightline.errors import CorruptError, NotFoundError, StorageError, UnsupportedFeatureError, WeightlineError
from weightline.serving.replica.following import Follower, Following, record_followed
from weightline.serving.replica.registration import Presence, Registration
from weightline.serving.replica.replica import Replica
from weightline.serving.replica.status import RefreshFacts, ReplicaStatus

_log = logging.getLogger(__name__)
_CLOSE_SECONDS = 10.0


class ReplicaService:
    """What the app and the follower share. `start` and `close` once each."""

    def __init__(self, replica: Replica, following: Following | None = None, presence: Presence | None = None) -> None:
        """Without a `presence` the replica is not registered: nobody finds it, and gc does not know of it."""
        self.replica = replica
        self.metrics = ReplicaMetrics(replica.name)
        self._follower = None if following is None else Follower(replica.chain, following)
        self._registration = (
            None if presence is None else Registration(replica.chain, replica.state_dir, presence, self.status)
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
        """Claim the replica's name, come back to where it was in the background, then follow the chain if asked to.

        InputError when another replica lives under the name.
        """
        if self._registration is not None:
            self._registration.moving_to = self.replica.returns_to
            self._registration.claim()
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """End the lease and the threads, after the refresh that they may be in; not waited for beyond some seconds."""
        self._stopping.set()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(_CLOSE_SECONDS)
        if self._registration is not None:
            # A bucket that is down must not keep the process from leaving: then the lease expires.
            ending = threading.Thread(target=self._registration.end, name="weightline-lease-end", daemon=True)
            ending.start()
            ending.join(_CLOSE_SECONDS)

    def refresh(self, version: int | None = None, *, allow_backward: bool = False) -> RefreshFacts:
        """`Replica.refresh`, announced in the lease and counted."""
        with self._moving_to(version):
            try:
                facts = self.replica.refresh(version, allow_backward=allow_backward)
            except WeightlineError as error:
                self.metrics.observe_failure(error, self.replica.version)
                raise
            self.metrics.observe_refresh(facts)
        return facts

    def status(self) -> ReplicaStatus:
        """The replica's state, and how far behind the chain it is. One short listing; nothing when the bucket fails."""
        tip, status = self.tip_version(), self.replica.status()
        behind = {} if tip is None or status.version is None else {"lag_versions": tip - status.version}
        seconds = self._lag_seconds(tip, status.version)
        self.metrics.observe_lag(seconds)
        follows = None if self._follower is None else self._follower.following.what
        return status.model_copy(update={"tip_version": tip, "lag_seconds": seconds, "follows": follows, **behind})

    def tip_version(self) -> int | None:
        """The chain's tip for status and metrics; None also when the bucket cannot say."""
        try:
            tip = self.replica.chain.tip_version()
        except StorageError:
            return None
        self.metrics.observe_tip(tip, self.replica.version)
        return tip

    def _lag_seconds(self, tip: int | None, version: int | None) -> float | None:
        """Age of the oldest version that is not served yet, by the writer's clock and ours; 0 at the tip."""
        if tip is None or version is None:
            return None
        if version >= tip:
            return 0.0
        try:
            created_at = self.replica.chain.manifest(version + 1).created_at
        except (NotFoundError, CorruptError, StorageError):
            return None
        return max(0.0, (datetime.now(UTC) - datetime.fromisoformat(created_at)).total_seconds())

    @contextmanager
    def _moving_to(self, version: int | None) -> Iterator[None]:
        """Announced in the lease, where there is one."""
        if self._registration is None:
            yield
            self.status()
            return
        with self._registration.moving(None if version == self.replica.version else version):
            yield

    def _run(self) -> None:
        self._recover()
        num_failures = 0
        while self._follower is not None and not self._stopping.is_set():
            num_failures = 0 if self._follow_once(self._follower) else num_failures + 1
            self._stopping.wait(self._follower.following.wait_seconds(num_failures))

    def _recover(self) -> None:
        try:
            with self._moving_to(self.replica.returns_to):
                facts = self.replica.recover()
        except WeightlineError as error:
            _log.warning("replica %s cannot come back to its version: %s", self.replica.name, error)
            self.metrics.observe_failure(error, self.replica.version)
            return
        if facts is not None:
            self.metrics.observe_refresh(facts)

    def _follow_once(self, follower: Follower) -> bool:
        """False after a failure, which is counted and told in `status`; the next round tries again."""
        try:
            target = follower.target()
            if target is None or target in (self.replica.version, self._refused):
                return True
            facts = self.refresh(target, allow_backward=follower.following.ref is not None)
            record_followed(self.replica.chain, self.replica.name, facts)
        except UnsupportedFeatureError as error:
            # Asking again cannot help: this engine will never serve that version, but perhaps the next one.
            _log.warning("replica %s passes over version %s: %s", self.replica.name, target, error)
            self._refused = target
        except WeightlineError as error:
            _log.warning("replica %s stays at %s: %s", self.replica.name, self.replica.version, error)
            return False
        return True


_PAUSE_BUCKETS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)


class ReplicaMetrics:
    """Safe to use from many threads."""

    def __init__(self, replica: str) -> None:
        self.registry = CollectorRegistry()
        self._labels = {"replica": replica}
        self.version = self._gauge("version", "Version that is served; -1: none")
        self.lag_versions = self._gauge(
            "lag_versions", "Versions between the one served and the tip when last looked at"
        )
        self.lag_seconds = self._gauge("lag_seconds", "Age of the oldest version that is not served yet; 0 at the tip")
        self.pause_seconds = self._histogram("refresh_pause_seconds", "How long the engine stood still in a refresh")
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

    def observe_refresh(self, facts: RefreshFacts) -> None:
        """Count a refresh that ended well. One that had nothing to do is none."""
        self.version.set(facts.version)
        if facts.from_version == facts.version:
            return
        self.pause_seconds.observe(facts.pause_seconds)
        self.prepare_seconds.observe(facts.prepare_seconds)
        self.payload_bytes.inc(facts.payload_nbytes)
        self.changed_elements.inc(facts.num_changed)

    def observe_failure(self, error: WeightlineError, version: int | None) -> None:
        """Count a refresh that failed, and say what is served after it."""
        self._failures.labels(**self._labels, kind=str(error.kind)).inc()
        self.version.set(-1 if version is None else version)

    def observe_tip(self, tip: int | None, version: int | None) -> None:
        self.lag_versions.set(0 if tip is None else tip - (-1 if version is None else version))

    def observe_lag(self, seconds: float | None) -> None:
        """NaN while the bucket cannot say."""
        self.lag_seconds.set(float("nan") if seconds is None else seconds)

    def render(self) -> bytes:
        """The text exposition format."""
        return generate_latest(self.registry)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"weightline_replica_{name}", text, ("replica",), registry=self.registry).labels(**self._labels)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(f"weightline_{name}", text, ("replica",), registry=self.registry).labels(**self._labels)

    def _histogram(self, name: str, text: str) -> Histogram:
        family = Histogram(f"weightline_{name}", text, ("replica",), registry=self.registry, buckets=_PAUSE_BUCKETS)
        return family.labels(**self._labels)
