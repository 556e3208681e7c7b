"""What a replica counts, for Prometheus. Each replica has a registry of its own."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from weightline.errors import WeightlineError
from weightline.serving.replica.facts import RefreshFacts

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
