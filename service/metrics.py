"""Every metric, in one object that is handed a registry. Labels are bounded by construction."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from models.taxonomy import Severity
from models.verdict import Verdict
from service.batcher import Batcher
from service.exchange import Direction
from service.records import Recorder
from service.routing import Upstreams
from service.state import State

_OVERHEAD_BUCKETS: Final = (
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5,
)  # fmt: skip
_UPSTREAM_BUCKETS: Final = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60)
_BATCH_BUCKETS: Final = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """Counters and histograms of one service."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self.requests = Counter(
            "sluicegate_http_requests_total",
            "Requests answered, by route template and status.",
            ["route", "status"],
            registry=registry,
        )
        self.outcomes = Counter(
            "sluicegate_outcomes_total",
            "What became of each judged exchange.",
            ["direction", "outcome"],
            registry=registry,
        )
        self.flagged = Counter(
            "sluicegate_flagged_total",
            "Texts whose severity is not none, once for each category that fired.",
            ["direction", "category", "severity", "outcome"],
            registry=registry,
        )
        self.rounds = Counter(
            "sluicegate_rounds_total",
            "Exchanges that were regenerated, by how that ended.",
            ["result"],
            registry=registry,
        )
        self.wasted_tokens = Counter(
            "sluicegate_wasted_tokens_total",
            "Completion tokens of attempts that were not released.",
            registry=registry,
        )
        self.released_before_verdict = Counter(
            "sluicegate_released_before_verdict_characters_total",
            "Characters that reached a client before they were judged.",
            registry=registry,
        )
        self.bypasses = Counter(
            "sluicegate_bypasses_total",
            "Texts that passed without a verdict because the policy fails open.",
            ["reason"],
            registry=registry,
        )
        self.cache_requests = Counter(
            "sluicegate_cache_requests_total",
            "Texts whose verdict was looked up, by whether it was there.",
            ["tier", "result"],
            registry=registry,
        )
        self.upstream_requests = Counter(
            "sluicegate_upstream_requests_total",
            "Calls of each upstream, by whether it answered.",
            ["upstream", "result"],
            registry=registry,
        )
        self.guard_seconds = Histogram(
            "sluicegate_guard_seconds",
            "Time for the verdicts of one direction, queue included.",
            ["direction"],
            buckets=_OVERHEAD_BUCKETS,
            registry=registry,
        )
        self.upstream_seconds = Histogram(
            "sluicegate_upstream_seconds",
            "Time for one attempt of the upstream.",
            buckets=_UPSTREAM_BUCKETS,
            registry=registry,
        )
        self.overhead_seconds = Histogram(
            "sluicegate_overhead_seconds",
            "Time that an exchange took beyond its upstream.",
            buckets=_OVERHEAD_BUCKETS,
            registry=registry,
        )
        self.batch_rows = Histogram(
            "sluicegate_guard_batch_rows",
            "Windows in one batch of the guard.",
            buckets=_BATCH_BUCKETS,
            registry=registry,
        )
        self.batch_seconds = Histogram(
            "sluicegate_guard_batch_seconds",
            "Time for one batch of the guard.",
            buckets=_OVERHEAD_BUCKETS,
            registry=registry,
        )
        self.build = Gauge(
            "sluicegate_build_info",
            "Always 1; the labels say what runs.",
            ["version", "guard", "policy"],
            registry=registry,
        )

        # Finding a labelled child costs more than counting in it. Their labels are few.
        self._outcome = cache(self.outcomes.labels)
        self._request = cache(self.requests.labels)
        self._guard_seconds = cache(self.guard_seconds.labels)
        self._cached = cache(self.cache_requests.labels)
        self._upstream_request = cache(self.upstream_requests.labels)

    def watch(
        self, batcher: Batcher, state: State, recorder: Recorder, upstreams: Upstreams
    ) -> None:
        """Shows what these parts count themselves, as it stands when it is asked for."""
        self.registry.register(_Watched(batcher, state, recorder, upstreams))

    def cached(self, is_hit: bool) -> None:
        """A verdict was looked up."""
        self._cached("local", "hit" if is_hit else "miss").inc()

    def upstream_answered(self, upstream: str, is_answered: bool) -> None:
        """An upstream was called."""
        self._upstream_request(upstream, "answered" if is_answered else "failed").inc()

    def answered(self, route: str, status: int) -> None:
        """A request was answered; ``route`` is a template."""
        self._request(route, status).inc()

    def judged(self, direction: Direction, seconds: float) -> None:
        """One direction of an exchange was judged."""
        self._guard_seconds(direction).observe(seconds)

    def ended(self, direction: Direction, outcome: str) -> None:
        """One direction of an exchange is over."""
        self._outcome(direction, outcome).inc()

    def batch(self, rows: int, tokens: int, seconds: float) -> None:
        """A batch of the guard was scored."""
        del tokens
        self.batch_rows.observe(rows)
        self.batch_seconds.observe(seconds)

    def verdict(self, direction: Direction, verdict: Verdict, outcome: str) -> None:
        """A text was judged, and ``outcome`` came of it."""
        if verdict.level is Severity.NONE:
            return
        # A text may be unsafe without any of the 19: it is counted all the same.
        for category in verdict.categories or ("uncategorised",):
            self.flagged.labels(direction, category, verdict.level.label, outcome).inc()


class _Watched(Collector):
    """Figures that other parts hold."""

    def __init__(
        self, batcher: Batcher, state: State, recorder: Recorder, upstreams: Upstreams
    ) -> None:
        self._batcher = batcher
        self._state = state
        self._recorder = recorder
        self._upstreams = upstreams

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        """One family each."""
        yield GaugeMetricFamily(
            "sluicegate_guard_waiting_windows",
            "Windows of text that wait for the guard.",
            self._batcher.waiting,
        )
        yield GaugeMetricFamily(
            "sluicegate_state_up",
            "Whether Redis answers (1) or not (0).",
            float(self._state.available),
        )
        upstreams = GaugeMetricFamily(
            "sluicegate_upstream_up",
            "Whether an upstream is asked (1), or left alone after failures (0).",
            labels=["upstream"],
        )
        for route in self._upstreams.routes:
            upstreams.add_metric([route.name], float(route.is_available))
        yield upstreams
        records = CounterMetricFamily(
            "sluicegate_records", "Records, by what became of them.", labels=["result"]
        )
        counts = self._recorder.counts
        for result in ("stored", "spooled", "duplicates", "unreadable", "lost"):
            records.add_metric([result], getattr(counts, result))
        yield records
