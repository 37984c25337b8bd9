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
from service.kept_texts import KeptTexts
from service.metrics import Metrics
from service.policy import Action, Policy
from service.records import Record, Recorder
from service.reviews import Reviews
from service.tracing import Tracer


@dataclass(frozen=True, slots=True)
class Request:
    """Where an exchange came from."""

    id: str
    route: str
    dialect: str
    model: str
    policy: Policy
    key_id: str | None = None
    subject: str | None = None
    """A keyed hash of whom the client named as its user."""


class Bookkeeper:
    """Opens a ledger for each exchange; holds what all of them share."""

    def __init__(
        self,
        metrics: Metrics,
        recorder: Recorder,
        guard_id: str,
        tracer: Tracer,
        texts: KeptTexts,
        reviews: Reviews | None = None,
    ) -> None:
        self.metrics = metrics
        self.recorder = recorder
        self.guard_id = guard_id
        self.tracer = tracer
        self.texts = texts
        self.reviews = reviews

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
        kept = self._kept()
        records = [
            self._record(entry, outcomes.get(entry.direction, "error"), attempts, total, weight)
            for entry in kept
        ]
        if self._keeper.reviews is not None:
            # Before anything is waited for: a client that goes away keeps nothing from review.
            for entry, record in zip(kept, records, strict=True):
                if self._asks_for_review(entry):
                    self._keeper.reviews.ask(record, "policy")
        await self._keeper.recorder.write(records)
        keeping = self._request.policy.record.text
        if keeping == "none":
            return
        for entry, record in zip(kept, records, strict=True):
            text = entry.judgement.field.judged.text
            await self._keeper.texts.keep(record.id, text, keeping, self._request.subject)

    def _weight(self) -> float | None:
        """1 where anything was flagged, acted on or is to be reviewed; else the weight of the
        sample, or None if not drawn.
        """
        if any(
            entry.judgement.decision.verdict.level > Severity.NONE
            or entry.judgement.decision.action is not Action.ALLOW
            or self._asks_for_review(entry)
            for entry in self._entries
        ):
            return 1.0
        share = self._request.policy.record.sample_passed
        is_drawn = random.random() < share  # noqa: S311 - a sample for statistics guards no secret
        return 1.0 / share if is_drawn else None

    def _kept(self) -> list[_Entry]:
        """The gravest entry of each direction and attempt; and where that is not to be reviewed
        but others are, the gravest of those too.
        """
        worst = _gravest(self._entries)
        reviewed = _gravest([entry for entry in self._entries if self._asks_for_review(entry)])
        more = [entry for side, entry in reviewed.items() if not self._asks_for_review(worst[side])]
        return [*worst.values(), *more]

    def _asks_for_review(self, entry: _Entry) -> bool:
        """Whether its rule does. A conversation repeats in each request what was answered, and so
        was reviewed, before.
        """
        judgement = entry.judgement
        if not judgement.decision.review or judgement.field.is_past:
            return False
        return not (judgement.field.is_joint and any(map(_is_flagged_past, self._entries)))

    def _record(
        self, entry: _Entry, outcome: Outcome, attempts: int, total: float, weight: float
    ) -> Record:
        decision = entry.judgement.decision
        verdict = decision.verdict
        return Record(
            time=time.time(),
            request_id=self._request.id,
            key_id=self._request.key_id,
            subject=self._request.subject,
            route=self._request.route,
            dialect=self._request.dialect,
            model=self._request.model,
            direction=entry.direction,
            field=entry.judgement.field.path,
            policy=self._request.policy.label,
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


def _gravest(entries: Sequence[_Entry]) -> dict[tuple[Direction, int], _Entry]:
    """The gravest of each direction and attempt."""
    gravest: dict[tuple[Direction, int], _Entry] = {}
    for entry in entries:
        side = (entry.direction, entry.attempt)
        if side not in gravest or _gravity(entry) > _gravity(gravest[side]):
            gravest[side] = entry
    return gravest


def _gravity(entry: _Entry) -> tuple[int, float]:
    decision = entry.judgement.decision
    return decision.action, decision.verdict.severity_score


def _is_flagged_past(entry: _Entry) -> bool:
    judgement = entry.judgement
    return judgement.field.is_past and judgement.decision.verdict.level > Severity.NONE
