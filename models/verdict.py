"""The verdict: what a guard says of one text. Frozen, and exchanged by every part.

The data that guards learn from has one severity a text, so a category's severity is the text's
level where the category fires, else none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

from models.taxonomy import CATEGORIES, SIGNALS, Role, Severity

OPERATING_POINT: Final = 0.5
"""Calibrated probabilities at or above this fire. There is no second threshold anywhere."""

_LEVELS: Final = tuple(Severity)


@dataclass(frozen=True, slots=True)
class Coverage:
    """How much of a text was judged.

    ``characters_judged`` is below ``characters_total`` where the guard's vocabulary has no symbol
    for a character. ``windows`` is how many pieces the text was judged in.
    """

    characters_judged: int
    characters_total: int
    windows: int


@dataclass(frozen=True, slots=True)
class Verdict:
    """Calibrated judgement of one text in one role. All scores are probabilities in 0–1."""

    role: Role
    at_least: tuple[float, float, float]
    """P(severity >= minor), P(>= moderate), P(>= severe); never increasing."""
    category_scores: tuple[float, ...]
    """One for each of ``CATEGORIES``, in order."""
    signal_scores: tuple[float, ...]
    """One for each of ``SIGNALS``, in order."""
    coverage: Coverage

    @property
    def unsafe_probability(self) -> float:
        """P(severity >= minor)."""
        return self.at_least[0]

    @property
    def severity_score(self) -> float:
        """Continuous severity in 0–1: the mean of the three cumulative probabilities."""
        return sum(self.at_least) / 3.0

    @property
    def level(self) -> Severity:
        """The largest level whose probability is at least the operating point."""
        # Asked for many times of each verdict, hence no loop.
        minor, moderate, severe = self.at_least
        return _LEVELS[
            (minor >= OPERATING_POINT) + (moderate >= OPERATING_POINT) + (severe >= OPERATING_POINT)
        ]

    @property
    def categories(self) -> tuple[str, ...]:
        """Categories that fire, highest score first; empty where the level is none."""
        if self.level is Severity.NONE:
            return ()
        fired = [
            (score, name)
            for name, score in zip(CATEGORIES, self.category_scores, strict=True)
            if score >= OPERATING_POINT
        ]
        return tuple(name for _, name in sorted(fired, key=lambda pair: -pair[0]))

    def category_severity(self, category: str) -> Severity:
        """The text's level where ``category`` fires, else none."""
        fires = self.category_scores[CATEGORIES.index(category)] >= OPERATING_POINT
        return self.level if fires else Severity.NONE

    @property
    def signals(self) -> tuple[str, ...]:
        """Signals at or above the operating point, in the order of ``SIGNALS``."""
        pairs = zip(SIGNALS, self.signal_scores, strict=True)
        return tuple(name for name, score in pairs if score >= OPERATING_POINT)

    def milder(self) -> Verdict:
        """The same verdict, one severity lower: severe counts as moderate, minor as none."""
        _, moderate, severe = self.at_least
        return replace(self, at_least=(moderate, severe, 0.0))

    def scores(self) -> Mapping[str, float]:
        """Every score by name, as ``taxonomy.evaluate`` reads them."""
        named = dict(zip(CATEGORIES, self.category_scores, strict=True))
        named |= zip(SIGNALS, self.signal_scores, strict=True)
        for level in (Severity.MINOR, Severity.MODERATE, Severity.SEVERE):
            named[f"severity:{level.label}"] = self.at_least[level - 1]
        return named


def nothing(role: Role) -> Verdict:
    """The verdict on a text that has no characters."""
    return Verdict(
        role, (0.0, 0.0, 0.0), (0.0,) * len(CATEGORIES), (0.0,) * len(SIGNALS), Coverage(0, 0, 0)
    )
