"""What the server counts: for Prometheus, and in short for the daemon's telemetry.

A mistake of a client is counted by its status but is not an *error*: errors are what a model or the
server did wrong, and a rollout may be judged by them.
"""

import math
import statistics
from collections import deque
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_WINDOW = 1000  # latest requests that latencies are taken over
_SECONDS = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 256, 1024)


@dataclass(slots=True)
class VersionMetrics:
    """What was counted in this process since a version took over."""

    version: str = ""  # empty: before the first
    requests: int = 0
    errors: int = 0
    latest_s: deque[float] = field(default_factory=lambda: deque(maxlen=_WINDOW))

    @property
    def p50_ms(self) -> float | None:
        """Median latency of the latest requests; None before the first."""
        return statistics.median(self.latest_s) * 1000 if self.latest_s else None

    @property
    def p95_ms(self) -> float | None:
        """Latency that 95 % of the latest requests stayed within; None before the first."""
        ranked = sorted(self.latest_s)
        return ranked[math.ceil(0.95 * len(ranked)) - 1] * 1000 if ranked else None


class Metrics:
    """The counters of one server process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = 0
        self.errors = 0
        self.now = VersionMetrics()
        self._requests = Counter(
            "shoal_inference_requests",
            "Inference requests answered, by HTTP status.",
            ["status"],
            registry=self.registry,
        )
        self._errors = Counter(
            "shoal_inference_errors",
            "Inference requests that failed by no fault of their client.",
            registry=self.registry,
        )
        self._seconds = Histogram(
            "shoal_inference_seconds",
            "Seconds from the first byte of a request to the last of its answer.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._rows = Histogram(
            "shoal_inference_run_rows",
            "Rows that went through the model in one run, of one request or several.",
            buckets=_ROWS,
            registry=self.registry,
        )
        self._serving = Gauge(
            "shoal_serving_info",
            "1 for the model version that is served; digests of its manifest and its file.",
            ["model", "version", "artifact"],
            registry=self.registry,
        )

    def answered(self, status: int, seconds: float) -> None:
        """Count one inference request; only those that succeeded enter the latencies."""
        self.requests += 1
        self.now.requests += 1
        self._requests.labels(str(status)).inc()
        if status >= 500:
            self.errors += 1
            self.now.errors += 1
            self._errors.inc()
        if status == 200:
            self.now.latest_s.append(seconds)
            self._seconds.observe(seconds)

    def ran(self, rows: int) -> None:
        """Count one run of the model."""
        self._rows.observe(rows)

    def serves(self, *, model: str, version: str, artifact: str) -> None:
        """Note what is served from now on; answers that are under way count as its own."""
        self.now = VersionMetrics(version)
        self._serving.clear()
        self._serving.labels(model, version, artifact).set(1)

    def render(self) -> bytes:
        """Return all of it in Prometheus' text format."""
        return generate_latest(self.registry)
