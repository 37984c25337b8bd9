"""Labels and verdicts of the same rows as columns, which is how figures read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np

from models.taxonomy import CATEGORIES, SIGNALS, Severity
from models.verdict import OPERATING_POINT, Verdict
from training.labelled import Example
from training.scores import Booleans, Floats, Integers
from training.split import normal

Positive = Literal["unsafe", "injection"]
"""What ``unsafe`` means in a file: harm, or an attack on the model."""

LENGTHS: Final[tuple[tuple[int, str], ...]] = (
    (100, "1-100"),
    (300, "101-300"),
    (1000, "301-1000"),
    (4000, "1001-4000"),
)
"""The most characters of a text in each class of lengths, and its name."""
_LONGEST: Final = ">4000"

_REFUSAL: Final = SIGNALS.index("refusal")
_INJECTION: Final = SIGNALS.index("injection")


@dataclass(frozen=True, slots=True)
class Columns:
    """One entry a row. A label counts only where the mask beside it is true."""

    clusters: tuple[str, ...]
    """The words of each row's prompt: rows of one prompt are not independent."""
    is_labelled: Booleans
    truth: Booleans
    probability: Floats
    flagged: Booleans
    is_graded: Booleans
    severity: Integers
    level: Integers
    has_categories: Booleans
    categories: Booleans
    """Shape (rows, 19), as is ``claimed``."""
    claimed: Booleans
    has_refusal: Booleans
    refusal: Booleans
    refused: Booleans
    groups: Mapping[str, Mapping[str, Booleans]]
    """Which rows are in each group, by the name of the table and of the group."""


def columns(
    examples: Sequence[Example], verdicts: Sequence[Verdict], positive: Positive = "unsafe"
) -> Columns:
    """Where ``positive`` is injection, the flag is compared with that signal, and with no harm."""
    harm = positive == "unsafe"
    level = np.array([verdict.level for verdict in verdicts], np.int64)
    if harm:
        probability = np.array([verdict.unsafe_probability for verdict in verdicts], float)
        flagged = level > Severity.NONE
    else:
        probability = np.array([verdict.signal_scores[_INJECTION] for verdict in verdicts], float)
        flagged = probability >= OPERATING_POINT
    return Columns(
        clusters=tuple(normal(example.prompt) for example in examples),
        is_labelled=np.array([example.unsafe is not None for example in examples], bool),
        truth=np.array([bool(example.unsafe) for example in examples], bool),
        probability=probability,
        flagged=flagged,
        is_graded=np.array([harm and example.severity is not None for example in examples], bool),
        severity=np.array([example.severity or 0 for example in examples], np.int64),
        level=level,
        has_categories=np.array([harm and bool(one.pku_categories) for one in examples], bool),
        categories=_membership([example.pku_categories or () for example in examples]),
        claimed=_membership([verdict.categories for verdict in verdicts]),
        has_refusal=np.array(
            [one.refusal is not None and one.role == "response" for one in examples], bool
        ),
        refusal=np.array([bool(example.refusal) for example in examples], bool),
        refused=np.array(
            [verdict.signal_scores[_REFUSAL] >= OPERATING_POINT for verdict in verdicts], bool
        ),
        groups={
            "by_source": _groups([(example.source,) for example in examples]),
            "by_source_category": _groups([example.categories or () for example in examples]),
            "by_length": _by_length(examples),
            "by_language": _groups([(example.lang,) for example in examples]),
            "by_role": _groups([(example.role,) for example in examples]),
        },
    )


def _membership(names: Sequence[Sequence[str]]) -> Booleans:
    rows = [[category in row for category in CATEGORIES] for row in names]
    return np.array(rows, bool).reshape(-1, len(CATEGORIES))


def _groups(names: Sequence[Sequence[str]]) -> dict[str, Booleans]:
    """The rows of each name, the most frequent name first; a row may have several, or none."""
    found = {name for row in names for name in row}
    masks = {name: np.array([name in row for row in names], bool) for name in sorted(found)}
    return dict(sorted(masks.items(), key=lambda item: -int(item[1].sum())))


def _by_length(examples: Sequence[Example]) -> dict[str, Booleans]:
    masks = _groups([(_length_class(len(example.text)),) for example in examples])
    order = [name for _, name in LENGTHS] + [_LONGEST]
    return {name: masks[name] for name in order if name in masks}


def _length_class(characters: int) -> str:
    return next((name for most, name in LENGTHS if characters <= most), _LONGEST)
