"""Every metric, in one object that is handed a registry. Labels are bounded by construction."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Final, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from models.taxonomy import Severity
from models.verdict import Verdict
from service.batcher import Batcher
from service.callers import Refusal
from service.event_index import EventIndex
from service.exchange import Direction
from service.gate import Outcome
from service.kept_texts import KeptTexts
from service.policies import Policies
from service.rate_limits import RateLimits
from service.records import Recorder
from service.reviews import Reviews
from service.routing import Upstreams
from service.state import State
from service.stored_policies import StoredPolicies

_OVERHEAD_BUCKETS: Final = (
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5,
)  # fmt: skip
_UPSTREAM_BUCKETS: Final = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60)
_BATCH_BUCKETS: Final = (1, 2, 4, 8, 16, 32, 64, 128)
_BYPASSES: Final = ("guard_unavailable", "unscannable", "open_route")
_ROUNDS: Final = ("rescued", "refused", "exhausted")


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
        self.refused_requests = Counter(
            "sluicegate_refused_requests_total",
            "Requests refused before they were read, by why.",
            ["reason"],
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
        self._show_zeros()

    def watch(
        self, batcher: Batcher, state: State, recorder: Recorder, upstreams: Upstreams
    ) -> None:
        """Shows what these parts count themselves, as it stands when it is asked for."""
        self.registry.register(_Watched(batcher, state, recorder, upstreams))

    def watch_shelf(self, texts: KeptTexts, index: EventIndex) -> None:
        """The same of what is kept beside records."""
        self.registry.register(_Shelf(texts, index))

    def watch_desk(self, reviews: Reviews, policies: Policies) -> None:
        """The same of what people decide and publish."""
        self.registry.register(_Desk(reviews, policies))

    def watch_limits(self, limits: RateLimits) -> None:
        """The same of what API keys may send."""
        self.registry.register(_Limits(limits))

    def built(self, version: str, guard: str, policy: str) -> None:
        """This is what runs, from now on."""
        self.build.clear()
        self.build.labels(version, guard, policy).set(1)

    def _show_zeros(self) -> None:
        """Shows at 0 what has few labels: Prometheus sees a first event as a rise only then."""
        for reason in _BYPASSES:
            self.bypasses.labels(reason)
        for result in _ROUNDS:
            self.rounds.labels(result)
        for refusal in get_args(Refusal):
            self.refused_requests.labels(refusal)
        for direction in get_args(Direction):
            for outcome in get_args(Outcome):
                self.outcomes.labels(direction, outcome)

    def cached(self, tier: str, result: str) -> None:
        """A verdict was looked up."""
        self._cached(tier, result).inc()

    def refused(self, reason: Refusal) -> None:
        """A request was refused before it was read."""
        self.refused_requests.labels(reason).inc()

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
        yield GaugeMetricFamily(
            "sluicegate_spool_filled_ratio",
            "How much of the room for records on the disk is taken.",
            self._recorder.spool_filled,
        )


class _Shelf(Collector):
    """Figures of kept texts and of the records' indexes."""

    def __init__(self, texts: KeptTexts, index: EventIndex) -> None:
        self._texts = texts
        self._index = index

    def collect(self) -> Iterator[CounterMetricFamily]:
        """One family each."""
        texts = CounterMetricFamily(
            "sluicegate_kept_texts",
            "Texts that a policy keeps, by whether they could be kept.",
            labels=["result"],
        )
        for result in ("kept", "missed"):
            texts.add_metric([result], getattr(self._texts.counts, result))
        yield texts
        indexed = CounterMetricFamily(
            "sluicegate_indexed_records",
            "Records indexed and counted by the hour here; unreadable ones are in no index.",
            labels=["result"],
        )
        for result in ("indexed", "unreadable"):
            indexed.add_metric([result], getattr(self._index.counts, result))
        yield indexed


class _Desk(Collector):
    """Figures of reviews and of published policies."""

    def __init__(self, reviews: Reviews, policies: Policies) -> None:
        self._reviews = reviews
        self._policies = policies

    def collect(self) -> Iterator[CounterMetricFamily]:
        """One family each."""
        counts = self._reviews.counts
        decisions = CounterMetricFamily(
            "sluicegate_review_decisions",
            "Reviews decided here, by whether the guard was right.",
            labels=["outcome"],
        )
        for outcome in ("confirmed", "overturned"):
            decisions.add_metric([outcome], getattr(counts, outcome))
        yield decisions
        reviews = CounterMetricFamily(
            "sluicegate_reviews",
            "Records to be reviewed, by what became of them.",
            labels=["result"],
        )
        for result in ("added", "missed", "dropped"):
            reviews.add_metric([result], getattr(counts, result))
        yield reviews
        if isinstance(self._policies, StoredPolicies):
            reloads = CounterMetricFamily(
                "sluicegate_policy_reloads",
                "Published policies, by whether they could be obeyed here.",
                labels=["result"],
            )
            for result in ("swapped", "unreadable"):
                reloads.add_metric([result], getattr(self._policies.counts, result))
            yield reloads


class _Limits(Collector):
    """Figures of rate limits."""

    def __init__(self, limits: RateLimits) -> None:
        self._limits = limits

    def collect(self) -> Iterator[CounterMetricFamily]:
        """One family."""
        counts = self._limits.counts
        checks = CounterMetricFamily(
            "sluicegate_rate_limit_checks",
            "Requests held against a limit, by where they were counted: local while Redis is away.",
            labels=["counted"],
        )
        for counted in ("shared", "local"):
            checks.add_metric([counted], getattr(counts, counted))
        yield checks
