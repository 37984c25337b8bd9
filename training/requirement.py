"""What a guard must reach: ``f1>=0.8`` and the like, against a report."""

from __future__ import annotations

import difflib
import operator
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

_FORM: Final = re.compile(r"\s*([^\s<>=]+)\s*(>=|<=|>|<)\s*([-+]?[\d.]+(?:e-?\d+)?)\s*", re.I)
_HOLDS: Final = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}


class RequirementError(ValueError):
    """A requirement that cannot be read, or names no figure."""


@dataclass(frozen=True, slots=True)
class Requirement:
    """``figure`` is a key of the report; keys inside others are joined by dots."""

    figure: str
    comparison: str
    bound: float

    def failure(self, figures: Mapping[str, float | None]) -> str | None:
        """Why the report does not meet it, in a sentence; None where it does.

        ``RequirementError`` where the report has no such figure.
        """
        if self.figure not in figures:
            near = difflib.get_close_matches(self.figure, figures, n=3)
            hint = f"; near it are {', '.join(near)}" if near else ""
            raise RequirementError(f"the report has no figure {self.figure}{hint}")
        value = figures[self.figure]
        if value is None:
            return f"{self.figure} is undefined: the data lacks the rows that it is over"
        if _HOLDS[self.comparison](value, self.bound):
            return None
        return f"{self.figure} is {value:g}, but must be {self.comparison} {self.bound:g}"


def parse(text: str) -> Requirement:
    """``RequirementError`` where ``text`` is not a figure, a comparison and a number."""
    found = _FORM.fullmatch(text)
    try:
        if found:
            return Requirement(found[1], found[2], float(found[3]))
    except ValueError:
        pass
    raise RequirementError(f"--require {text}: write a figure, >=, <=, > or <, and a number")


def figures(report: Mapping[str, Any], prefix: str = "") -> dict[str, float | None]:
    """Every number of a report, whatever its depth, by its keys joined by dots."""
    found: dict[str, float | None] = {}
    for key, value in report.items():
        if isinstance(value, Mapping):
            found |= figures(value, f"{prefix}{key}.")
        elif value is None or isinstance(value, int | float):
            found[f"{prefix}{key}"] = value
    return found
