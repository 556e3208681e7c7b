"""The metrics of a front, in the format of Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS_BUCKETS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class FrontMetrics:
    """A front's metrics for Prometheus, in a registry of its own, and the totals that its status shows."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = self._counter("requests", "Answers to clients, by route and status", "route", "status")
        self._retries = self._counter(
            "retries", "Requests that a replica did not answer, by reason", "replica", "reason"
        )
        self._routed = self._counter("routed", "Answers by replica: is it the home of the key", "replica", "home")
        self._version = Gauge(
            "weightline_front_replica_version", "Version that a replica serves; -1: none, or it does not answer",
            ("replica",), registry=self.registry,
        )  # fmt: skip
        self._seconds = Histogram(
            "weightline_front_request_seconds", "Seconds until the answer began, or was whole if it is no stream",
            ("route",), registry=self.registry, buckets=_SECONDS_BUCKETS,
        )  # fmt: skip
        self.num_requests = self.num_retries = self.num_home = self.num_elsewhere = 0
        self.retries_by_reason: dict[str, int] = {}

    def count_answer(self, route: str, status: int, seconds: float) -> None:
        """Counts an answer to a client."""
        self.num_requests += 1
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def count_retry(self, replica: str, reason: str) -> None:
        """Counts a request that the replica did not answer."""
        self.num_retries += 1
        self.retries_by_reason[reason] = self.retries_by_reason.get(reason, 0) + 1
        self._retries.labels(replica, reason).inc()

    def count_routed(self, replica: str, *, is_home: bool) -> None:
        """Counts a request that the replica answered."""
        if is_home:
            self.num_home += 1
        else:
            self.num_elsewhere += 1
        self._routed.labels(replica, str(is_home).lower()).inc()

    def set_version(self, replica: str, version: int | None) -> None:
        """Sets the version that a replica serves."""
        self._version.labels(replica).set(-1 if version is None else version)

    def render(self) -> bytes:
        """Returns the text exposition format."""
        return generate_latest(self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"weightline_front_{name}", text, labels, registry=self.registry)
