"""What Prometheus reads. Plain counters on the way of a step, turned into metric families when somebody asks."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric

BOUNDS_S = (0.0001, 0.0005, 0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 60.0)


class Histogram:
    """Counts of seconds by `BOUNDS_S`."""

    __slots__ = ("counts", "total")

    def __init__(self) -> None:
        self.counts = [0] * (len(BOUNDS_S) + 1)
        self.total = 0.0

    def observe(self, seconds: float) -> None:
        """Counts one."""
        self.counts[bisect_left(BOUNDS_S, seconds)] += 1
        self.total += seconds

    def buckets(self) -> list[tuple[str, float]]:
        """Returns (upper bound, count up to it), as Prometheus wants them."""
        result, count = [], 0
        for bound, here in zip((*BOUNDS_S, float("inf")), self.counts, strict=True):
            count += here
            result.append(("+Inf" if bound == float("inf") else str(bound), float(count)))
        return result


class Metrics:
    """The counters of one server; `gauges` are asked for when somebody reads."""

    def __init__(self) -> None:
        self.gauges: dict[str, tuple[str, Callable[[], float]]] = {}
        """Name -> what it is, its value now."""
        self.requests: Counter[tuple[str, int]] = Counter()
        """By route and status."""
        self.errors: Counter[str] = Counter()
        """By code, items of batches included."""
        self._created: Counter[str] = Counter()
        self._ended: Counter[tuple[str, str]] = Counter()
        self._seconds: dict[str, Histogram] = {}
        self._registry = CollectorRegistry()
        self._registry.register(self)
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self._registry)

    def created(self, env: str) -> None:
        """Counts a session."""
        self._created[env] += 1

    def ended(self, env: str, why: str) -> None:
        """Counts the end of a session."""
        self._ended[env, why] += 1

    def stepped(self, env: str, seconds: float) -> None:
        """Counts a step and the time it took."""
        histogram = self._seconds.get(env)
        if histogram is None:
            histogram = self._seconds[env] = Histogram()
        histogram.observe(seconds)

    def text(self) -> bytes:
        """Returns everything in Prometheus' text format."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """Yields the metric families (the interface of a Prometheus collector)."""
        for name, (words, value) in self.gauges.items():
            yield GaugeMetricFamily(f"agentrl_{name}", words, value=value())
        created = CounterMetricFamily("agentrl_sessions_created", "Sessions begun.", labels=["env"])
        for env, count in self._created.items():
            created.add_metric([env], count)
        ended = CounterMetricFamily("agentrl_sessions_ended", "Sessions ended, by reason.", labels=["env", "reason"])
        for labels, count in self._ended.items():
            ended.add_metric(labels, count)
        requests = CounterMetricFamily("agentrl_requests", "Requests answered.", labels=["route", "status"])
        for (route, status), count in self.requests.items():
            requests.add_metric([route, str(status)], count)
        errors = CounterMetricFamily("agentrl_errors", "Errors, items of batches included.", labels=["code"])
        for code, count in self.errors.items():
            errors.add_metric([str(code)], count)
        seconds = HistogramMetricFamily("agentrl_step_seconds", "Time of one step, waiting included.", labels=["env"])
        for env, histogram in self._seconds.items():
            seconds.add_metric([env], histogram.buckets(), histogram.total)
        yield from (created, ended, requests, errors, seconds)
