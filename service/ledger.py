"""What one exchange leaves behind: its records and its metrics."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

from models.taxonomy import Severity
from service.exchange import Direction
from service.gate import Outcome
from service.judgement import Judgement
from service.metrics import Metrics
from service.policy import Policy
from service.records import Record, Recorder


@dataclass(frozen=True, slots=True)
class Request:
    """Where an exchange came from."""

    id: str
    route: str
    dialect: str
    model: str


class Bookkeeper:
    """Opens a ledger for each exchange; holds what all of them share."""

    def __init__(self, metrics: Metrics, recorder: Recorder, policy: Policy, guard_id: str) -> None:
        self.metrics = metrics
        self.recorder = recorder
        self.policy = policy
        self.policy_name = f"{policy.id}@{policy.version}"
        self.guard_id = guard_id

    def open(self, request: Request) -> Ledger:
        """A ledger for one exchange, which begins now."""
        return Ledger(self, request)


@dataclass(frozen=True, slots=True)
class _Entry:
    direction: Direction
    attempt: int
    judgement: Judgement
    seconds: float


class Ledger:
    """Notes what happens to one exchange; ``close`` makes it durable and counts it."""

    def __init__(self, keeper: Bookkeeper, request: Request) -> None:
        self._keeper = keeper
        self._request = request
        self._started = time.perf_counter()
        self._entries: list[_Entry] = []
        self.upstream_seconds = 0.0
        self.prompt_tokens: int | None = None
        self.response_tokens: int | None = None
        self.wasted_tokens = 0

    def judged(
        self, direction: Direction, attempt: int, judgements: Sequence[Judgement], seconds: float
    ) -> None:
        """One direction was judged, in ``seconds``."""
        self._keeper.metrics.judged(direction, seconds)
        self._entries += (
            _Entry(direction, attempt, judgement, seconds) for judgement in judgements
        )

    def called_upstream(self, seconds: float) -> None:
        """The upstream was asked once."""
        self.upstream_seconds += seconds
        self._keeper.metrics.upstream_seconds.observe(seconds)

    async def close(self, outcomes: dict[Direction, Outcome], attempts: int) -> None:
        """Counts the outcome of each direction and returns when the records are durable."""
        metrics = self._keeper.metrics
        total = time.perf_counter() - self._started
        for direction, outcome in outcomes.items():
            metrics.ended(direction, outcome)
        for entry in self._entries:
            verdict = entry.judgement.decision.verdict
            metrics.verdict(entry.direction, verdict, outcomes.get(entry.direction, "error"))
        if self.wasted_tokens:
            metrics.wasted_tokens.inc(self.wasted_tokens)
        metrics.overhead_seconds.observe(max(total - self.upstream_seconds, 0.0))
        weight = self._weight()
        if weight is None:
            return
        await self._keeper.recorder.write(
            [
                self._record(entry, outcomes.get(entry.direction, "error"), attempts, total, weight)
                for entry in self._worst()
            ]
        )

    def _weight(self) -> float | None:
        """1 where anything was flagged; else the weight of the sample, or None if not drawn."""
        if any(e.judgement.decision.verdict.level > Severity.NONE for e in self._entries):
            return 1.0
        share = self._keeper.policy.record.sample_passed
        is_drawn = random.random() < share  # noqa: S311 - a sample for statistics guards no secret
        return 1.0 / share if is_drawn else None

    def _worst(self) -> list[_Entry]:
        """The gravest entry of each direction and attempt."""
        worst: dict[tuple[Direction, int], _Entry] = {}
        for entry in self._entries:
            key = (entry.direction, entry.attempt)
            if key not in worst or _gravity(entry) > _gravity(worst[key]):
                worst[key] = entry
        return list(worst.values())

    def _record(
        self, entry: _Entry, outcome: Outcome, attempts: int, total: float, weight: float
    ) -> Record:
        decision = entry.judgement.decision
        verdict = decision.verdict
        return Record(
            time=time.time(),
            request_id=self._request.id,
            key_id=None,
            route=self._request.route,
            dialect=self._request.dialect,
            model=self._request.model,
            direction=entry.direction,
            field=entry.judgement.field.path,
            policy=self._keeper.policy_name,
            guard=self._keeper.guard_id,
            level=verdict.level.label,
            severity_score=verdict.severity_score,
            category_scores=verdict.category_scores,
            signal_scores=verdict.signal_scores,
            rule=decision.rule,
            action=decision.action.label,
            outcome=outcome,
            attempts=attempts,
            prompt_tokens=self.prompt_tokens,
            response_tokens=self.response_tokens,
            wasted_tokens=self.wasted_tokens,
            guard_milliseconds=entry.seconds * 1000,
            upstream_milliseconds=self.upstream_seconds * 1000,
            total_milliseconds=total * 1000,
            hash=entry.judgement.digest.hex(),
            weight=weight,
        )


def _gravity(entry: _Entry) -> tuple[int, float]:
    decision = entry.judgement.decision
    return decision.action, decision.verdict.severity_score
