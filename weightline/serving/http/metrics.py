"""The metrics of a replica, in the format of Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from weightline.errors import WeightlineError
from weightline.serving.replica.status import RefreshFacts, ReplicaStatus

#: The kind of an error that is not one of weightline's own.
UNEXPECTED = "unexpected"
#: Those of `RefreshFacts`, in their order. The first three belong to the preparation.
_PARTS = ("fetch", "read_base", "decode", "stage", "drain")
_PAUSE_BUCKETS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)


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
        self._parts = Histogram(
            "weightline_refresh_part_seconds", "Seconds of a refresh before its pause, by part", ("replica", "part"),
            registry=self.registry, buckets=_PAUSE_BUCKETS,
        )  # fmt: skip
        self.payload_bytes = self._counter("refresh_payload_bytes", "Bytes of payloads that refreshes fetched")
        self.changed_elements = self._counter("refresh_changed_elements", "Elements that refreshes wrote")
        self._failures = self._failures_of("refresh_failures", "Refreshes that failed, by kind")
        self._follow_failures = self._failures_of("follow_failures", "Looks for a new version that failed, by kind")
        self._lease_failures = self._failures_of("lease_failures", "Renewals of the lease that failed, by kind")
        self.completions = self._counter("completions", "Prompts (behind vLLM: requests) that were answered")
        self.version.set(-1)

    def count_refresh(self, facts: RefreshFacts) -> None:
        """Counts a refresh that succeeded. One that had nothing to do is not counted."""
        self.version.set(facts.version)
        if facts.from_version == facts.version:
            return
        self.pause_seconds.observe(facts.pause_seconds)
        self.prepare_seconds.observe(facts.prepare_seconds)
        for part in _PARTS:
            self._parts.labels(**self._labels, part=part).observe(getattr(facts, f"{part}_seconds"))
        self.payload_bytes.inc(facts.payload_nbytes)
        self.changed_elements.inc(facts.num_changed)

    def count_failure(self, error: Exception, version: int | None) -> None:
        """Counts a refresh that failed, and sets the version that is served after it."""
        self._failures.labels(**self._labels, kind=_kind_of(error)).inc()
        self.version.set(-1 if version is None else version)

    def count_follow_failure(self, error: Exception) -> None:
        """Counts a look for a new version that failed. A refresh that failed in it is counted as such, too."""
        self._follow_failures.labels(**self._labels, kind=_kind_of(error)).inc()

    def count_lease_failure(self, error: Exception) -> None:
        """Counts a renewal of the lease that failed."""
        self._lease_failures.labels(**self._labels, kind=_kind_of(error)).inc()

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

    def _failures_of(self, name: str, text: str) -> Counter:
        return Counter(f"weightline_{name}", text, ("replica", "kind"), registry=self.registry)

    def _histogram(self, name: str, text: str) -> Histogram:
        family = Histogram(f"weightline_{name}", text, ("replica",), registry=self.registry, buckets=_PAUSE_BUCKETS)
        return family.labels(**self._labels)


def _kind_of(error: Exception) -> str:
    return str(error.kind) if isinstance(error, WeightlineError) else UNEXPECTED
