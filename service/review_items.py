"""What a review is: a record to look at, who has it, and what was decided. Pure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from models.taxonomy import CATEGORIES, Severity
from service.errors import BadRequest

VERSION: Final = 1
_LONGEST_NAME: Final = 128
_LONGEST_NOTE: Final = 1000
_LEVELS: Final = tuple(level.label for level in Severity)

Reason = Literal["policy", "borderline", "reported", "sampled"]
"""Why: a rule says so, the guard was in doubt, somebody complained, or it was drawn."""
Outcome = Literal["confirmed", "overturned"]
"""Whether the guard was right."""


@dataclass(frozen=True, slots=True)
class Decision:
    """What a reviewer said. ``severity`` and ``categories`` are those that the text has."""

    reviewer: str
    outcome: str
    severity: str
    categories: tuple[str, ...]
    note: str
    time: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Review:
    """A record to look at. ``level`` to ``outcome`` are what the service said of it."""

    id: str
    """The record's."""
    reason: str
    time: float
    """When the record was made; this and other times in seconds since 1970."""
    request_id: str
    direction: str
    level: str | None
    severity_score: float | None
    categories: tuple[str, ...]
    policy: str
    guard: str
    route: str
    outcome: str
    key_id: str | None
    reviewer: str | None = None
    """Who claimed it last, and until when; that may be over."""
    claimed_until: float = 0.0
    decision: Decision | None = None

    @classmethod
    def from_values(cls, values: Any) -> Review:
        """Of JSON that was decoded; keys that are not known are passed over.

        Raises ``ValueError`` where a later release wrote another kind.
        """
        try:
            if values["version"] > VERSION:
                raise ValueError("a later release wrote it")
            claim, decided = values.get("claim") or {}, values.get("decision")
            return cls(
                id=values["id"],
                reason=values["reason"],
                time=values["time"],
                request_id=values["request_id"],
                direction=values["direction"],
                level=values["level"],
                severity_score=values["severity_score"],
                categories=tuple(values["categories"]),
                policy=values["policy"],
                guard=values["guard"],
                route=values["route"],
                outcome=values["outcome"],
                key_id=values["key_id"],
                reviewer=claim.get("reviewer"),
                claimed_until=claim.get("until", 0.0),
                decision=None if decided is None else _decision(decided),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError("it is not what a review is stored as") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class ReviewFilters:
    """What open items must be, all of it; None asks for nothing."""

    reason: str | None = None
    direction: str | None = None
    category: str | None = None
    severity: str | None = None
    """At least this, as the guard saw it."""
    policy: str | None = None
    """``id``, or ``id@revision``."""
    key: str | None = None
    is_free_for: str | None = None
    """Unclaimed, or claimed by this reviewer."""

    def match(self, item: Review, now: float) -> bool:
        """Whether an item is what is asked for; ``now`` is the server's time in seconds."""
        is_claimed = item.claimed_until > now and item.reviewer != self.is_free_for
        return (
            self.reason in (None, item.reason)
            and self.direction in (None, item.direction)
            and (self.category is None or self.category in item.categories)
            and (self.severity is None or _rank(item.level) >= _rank(self.severity))
            and self.policy in (None, item.policy, item.policy.partition("@")[0])
            and self.key in (None, item.key_id)
            and (self.is_free_for is None or not is_claimed)
        )


def read_review(data: bytes) -> Review | None:
    """An item of stored JSON, or None where a later release writes another kind."""
    try:
        return Review.from_values(json.loads(data))
    except ValueError:
        return None


def _decision(values: Any) -> Decision:
    return Decision(
        reviewer=values["reviewer"],
        outcome=values["outcome"],
        severity=values["severity"],
        categories=tuple(values["categories"]),
        note=values.get("note", ""),
        time=values["time"],
    )


def _rank(level: str | None) -> int:
    """A severity's number; less than all where there is none, or a later version's."""
    return _LEVELS.index(level) if level in _LEVELS else -1


def check_name(reviewer: str) -> None:
    """``BadRequest`` where it is empty or too long."""
    if not 0 < len(reviewer) <= _LONGEST_NAME:
        raise BadRequest(f"reviewer must have 1 to {_LONGEST_NAME} characters", param="reviewer")


def check_decision(outcome: str, severity: str, categories: Sequence[str], note: str) -> None:
    """``BadRequest`` where a word is unknown, or two contradict each other."""
    if outcome not in ("confirmed", "overturned"):
        raise BadRequest("outcome must be confirmed or overturned", param="outcome")
    if severity not in _LEVELS:
        raise BadRequest(f"severity must be one of {', '.join(_LEVELS)}", param="severity")
    if not set(categories) <= set(CATEGORIES):
        raise BadRequest("a category is unknown: see docs/taxonomy.md", param="categories")
    if categories and severity == "none":
        raise BadRequest("severity is none, so categories must be empty", param="categories")
    if len(note) > _LONGEST_NOTE:
        raise BadRequest(f"note is longer than {_LONGEST_NOTE} characters", param="note")


def check_outcome(item: Review, outcome: str, severity: str, categories: list[str]) -> None:
    """``BadRequest`` unless a confirmed text is flagged as the guard had it, and an overturned one
    differs from it in something.
    """
    if item.level not in _LEVELS:
        return
    is_same = item.level == severity and list(item.categories) == categories
    if outcome == "overturned" and is_same:
        raise BadRequest(
            "outcome is overturned, but severity and categories are the guard's: say confirmed",
            param="outcome",
        )
    if outcome == "confirmed" and (item.level == "none") != (severity == "none"):
        raise BadRequest(
            f"outcome is confirmed, but the guard said {item.level}: say overturned",
            param="outcome",
        )


def is_again(
    item: Review, reviewer: str, outcome: str, severity: str, categories: list[str]
) -> bool:
    """Whether an item was decided just so by the same reviewer."""
    made = item.decision
    return made is not None and (reviewer, outcome, severity, tuple(categories)) == (
        made.reviewer,
        made.outcome,
        made.severity,
        made.categories,
    )
