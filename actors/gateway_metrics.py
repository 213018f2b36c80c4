"""What the gateway tells Prometheus: its own counts, and the service's at the time of the scrape.

Owns the registry of one gateway. Figures of the service are made from one ServiceStats; nothing is kept of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from rollout.fleet import ServiceStats

SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
GAUGES = {
    "live_version": "Weight version that is served",
    "num_queued": "Trajectories that wait for an engine",
    "num_running": "Trajectories that are generated",
    "tokens_per_s": "Tokens generated in a second, over the last few",
    "num_clients": "Clients with unfinished work",
    "num_interactive": "Users' completions under way",
    "admission_bound": "Users' completions that may be under way at once, so that they keep their targets",
    "num_groups_wanted": "Expert-parallel groups that there shall be",
}
COUNTERS = {
    "num_finished": "Trajectories that ended by themselves",
    "num_aborted": "Trajectories given up by their clients",
    "num_tokens_generated": "Tokens that engines sent",
    "num_tokens_discarded": "Tokens that were thrown away",
    "num_tokens_restored": "Tokens that the journal had",
    "num_syncs": "Weight publications that succeeded",
    "num_syncs_refused": "Weight publications that were refused",
    "num_retries": "Chunks tried again after an engine died",
    "num_chunks": "Chunks started",
    "num_migrations": "Chunks that started elsewhere than the one before",
    "num_cuts": "Chunks cut for something more urgent or a drain",
    "num_regenerated": "Trajectories that began anew for being too stale",
    "num_groups_expired": "Groups dropped because their client fell silent",
    "num_journal_waits": "Writes that waited for the journal",
    "num_internal_errors": "Faults of the controller itself",
}
BY_REASON = {
    "num_failed": "Trajectories that failed, by reason",
    "num_group_deaths": "Expert-parallel groups that died, by reason",
    "num_refused": "Users' requests that were refused, by reason",
}
SHARD_GAUGES = {
    "version": "Weight version of a shard",
    "num_running": "Sequences that a shard decodes",
    "num_waiting": "Sequences that wait inside a shard",
    "kv_usage": "Share of a shard's KV cache in use",
}
SHARD_COUNTERS = {
    "num_tokens_generated": "Tokens that a shard generated",
    "num_preemptions": "Preemptions in a shard's engine",
}


class GatewayMetrics:
    """Counts of one gateway replica."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "longroll_gateway_requests", "HTTP requests", ("route", "method", "status"), registry=self._registry
        )
        self._seconds = Histogram(
            "longroll_gateway_request_seconds",
            "Time of a request",
            ("route",),
            buckets=SECONDS,
            registry=self._registry,
        )
        self._ttft = Histogram(
            "longroll_gateway_ttft_seconds", "Time to the first token", buckets=SECONDS, registry=self._registry
        )
        self._tokens = Counter("longroll_gateway_tokens", "Tokens of completions", ("kind",), registry=self._registry)
        self._open = Gauge("longroll_gateway_open_choices", "Completions under way", registry=self._registry)

    def on_request(self, route: str, method: str, status: int, seconds: float) -> None:
        """A request was answered. A method that nobody knows is one with all others."""
        self._requests.labels(route, method if method in METHODS else "other", str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def on_completion(self, num_prompt_tokens: int, num_tokens: int, ttft_s: float | None) -> None:
        """A completion was answered, in full or in part."""
        self._tokens.labels("prompt").inc(num_prompt_tokens)
        self._tokens.labels("completion").inc(num_tokens)
        if ttft_s is not None:
            self._ttft.observe(ttft_s)

    def render(self, stats: ServiceStats | None, num_open: int) -> bytes:
        """Everything in Prometheus's text format.

        Args:
            stats: Of the service; None if it did not answer, which is told as longroll_up 0.
            num_open: Completions under way.
        """
        self._open.set(num_open)
        registry = CollectorRegistry(auto_describe=False)
        registry.register(_Snapshot(stats))  # type: ignore[arg-type]
        return generate_latest(self._registry) + generate_latest(registry)


class _Snapshot:
    """A collector of figures that are there already."""

    def __init__(self, stats: ServiceStats | None) -> None:
        self._stats = stats

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterable[Metric]:
        """One family for each figure."""
        yield GaugeMetricFamily("longroll_up", "Whether the service answers", float(self._stats is not None))
        if self._stats is None:
            return
        for name, text in GAUGES.items():
            yield GaugeMetricFamily(_name(name), text, getattr(self._stats, name))
        for name, text in COUNTERS.items():
            yield CounterMetricFamily(_name(name), text, getattr(self._stats, name))
        for name, text in BY_REASON.items():
            yield _by_reason(name, text, getattr(self._stats, name))
        yield from self._of_shards()

    def _of_shards(self) -> Iterable[Metric]:
        assert self._stats is not None, "asked for only with figures"
        for name, text in SHARD_GAUGES.items():
            gauge = GaugeMetricFamily(_name(name, "shard_"), text, labels=("shard",))
            for shard in self._stats.shards:
                gauge.add_metric((str(shard.rank),), getattr(shard, name))
            yield gauge
        for name, text in SHARD_COUNTERS.items():
            counter = CounterMetricFamily(_name(name, "shard_"), text, labels=("shard",))
            for shard in self._stats.shards:
                counter.add_metric((str(shard.rank),), getattr(shard, name))
            yield counter


def _name(name: str, kind: str = "") -> str:
    """A figure's name as Prometheus wants it: what is counted, without "num"."""
    return f"longroll_{kind}{name.removeprefix('num_')}"


def _by_reason(name: str, text: str, counts: Mapping[str, int]) -> Metric:
    family = CounterMetricFamily(_name(name), text, labels=("reason",))
    for reason, count in counts.items():
        family.add_metric((reason,), count)
    return family
