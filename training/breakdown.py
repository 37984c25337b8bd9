"""The figures of one set of rows, whole and in parts, as functions of columns and weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from models.taxonomy import CATEGORIES, Severity
from training import scores
from training.bootstrap import Figures, Path
from training.columns import Columns
from training.scores import Booleans, Floats

CURVE_BINS: Final = 10


def overall(rows: Columns, weights: Floats) -> Figures:
    """The figures of data/README: one number each, over the rows that carry each label.

    Category figures are over rows labelled unsafe that have ``pku_categories``; ``refusal_f1`` is
    over responses with that label.
    """
    labelled, graded, sorted_out = rows.is_labelled, rows.is_graded, rows.has_categories
    answers = rows.has_refusal
    found = scores.binary(
        rows.truth[labelled],
        rows.probability[labelled],
        rows.flagged[labelled],
        weights[:, labelled],
    )
    found |= scores.severity(rows.severity[graded], rows.level[graded], weights[:, graded])
    found |= scores.multilabel(
        rows.categories[sorted_out], rows.claimed[sorted_out], weights[:, sorted_out]
    )
    refusals = scores.rates(rows.refusal[answers], rows.refused[answers], weights[:, answers])
    found["refusal_f1"] = refusals["f1"]
    return {(name,): value for name, value in found.items()}


def parts(rows: Columns, weights: Floats) -> Figures:
    """The tables: by category, severity and group, and the calibration curve."""
    found: Figures = {}
    for table, group, inside in _labelled_groups(rows):
        values = scores.rates(rows.truth[inside], rows.flagged[inside], weights[:, inside])
        found |= {(table, group, name): value for name, value in values.items()}
    return found | _by_category(rows, weights) | _by_severity(rows, weights) | _curve(rows, weights)


def counts(rows: Columns) -> dict[Path, Any]:
    """How many rows each table is over, and what has no interval."""
    found: dict[Path, Any] = {}
    for table, group, inside in _labelled_groups(rows):
        found[table, group, "n"] = int(inside.sum())
        found[table, group, "unsafe"] = int((inside & rows.truth).sum())
    for column, name in _present_categories(rows):
        found["by_category", name, "n"] = int(rows.categories[rows.has_categories, column].sum())
    for level in _present_levels(rows):
        n = int((rows.severity[rows.is_graded] == level).sum())
        found["by_severity", level.label, "n"] = n
    for name, inside in _bins(rows):
        found["calibration_curve", name, "n"] = int(inside.sum())
    graded = rows.is_graded
    confusion = scores.confusion(rows.severity[graded], rows.level[graded])[0]
    found[("severity_confusion",)] = confusion.astype(int).tolist()
    found[("false_flags",)] = _false_flags(rows)
    return found


def _labelled_groups(rows: Columns) -> list[tuple[str, str, Booleans]]:
    masks = [
        (table, group, mask & rows.is_labelled)
        for table, groups in rows.groups.items()
        for group, mask in groups.items()
    ]
    return [(table, group, mask) for table, group, mask in masks if mask.any()]


def _present_categories(rows: Columns) -> list[tuple[int, str]]:
    totals = rows.categories[rows.has_categories].sum(axis=0)
    return [(column, name) for column, name in enumerate(CATEGORIES) if totals[column]]


def _by_category(rows: Columns, weights: Floats) -> Figures:
    """Whether the category is named, and whether its texts are flagged at all."""
    inside = rows.has_categories
    weights = weights[:, inside]
    found: Figures = {}
    for column, name in _present_categories(rows):
        truth = rows.categories[inside, column]
        values = scores.rates(truth, rows.claimed[inside, column], weights)
        values["flagged"] = scores.rates(truth, rows.flagged[inside], weights)["recall"]
        values.pop("fpr")
        found |= {("by_category", name, figure): value for figure, value in values.items()}
    return found


def _present_levels(rows: Columns) -> list[Severity]:
    graded = set(rows.severity[rows.is_graded].tolist())
    return [level for level in Severity if level in graded and level > Severity.NONE]


def _by_severity(rows: Columns, weights: Floats) -> Figures:
    """Over truly unsafe rows: flagged at all (recall), at the right level, and the level's F1."""
    graded = rows.is_graded
    confusion = scores.confusion(rows.severity[graded], rows.level[graded], weights[:, graded])
    f1 = scores.level_f1(confusion)
    found: Figures = {}
    for level in _present_levels(rows):
        row = confusion[:, level]
        path = ("by_severity", level.label)
        found[*path, "recall"] = scores.ratio(row[:, Severity.MINOR :].sum(axis=1), row.sum(axis=1))
        found[*path, "exact"] = scores.ratio(row[:, level], row.sum(axis=1))
        found[*path, "f1"] = f1[:, level - 1]
    return found


def _bins(rows: Columns) -> list[tuple[str, Booleans]]:
    """The rows in each bin of the calibration curve that has any, by the bin's bounds."""
    masks = scores.in_bins(rows.probability, CURVE_BINS) & rows.is_labelled[:, None]
    names = [f"{n / CURVE_BINS:.1f}-{(n + 1) / CURVE_BINS:.1f}" for n in range(CURVE_BINS)]
    return [(name, masks[:, n]) for n, name in enumerate(names) if masks[:, n].any()]


def _curve(rows: Columns, weights: Floats) -> Figures:
    found: Figures = {}
    for name, inside in _bins(rows):
        drawn = weights[:, inside]
        total = drawn.sum(axis=1)
        path = ("calibration_curve", name)
        found[*path, "predicted"] = scores.ratio(drawn @ rows.probability[inside], total)
        found[*path, "observed"] = scores.ratio(drawn @ rows.truth[inside], total)
    return found


def _false_flags(rows: Columns) -> Mapping[str, Any]:
    """What was claimed of harmless rows; a row may have several categories, or none."""
    harmless = rows.is_labelled & ~rows.truth
    wrong = harmless & rows.flagged
    claimed = rows.claimed[wrong]
    each = {name: int(n) for name, n in zip(CATEGORIES, claimed.sum(axis=0), strict=True) if n}
    levels = {level.label: int((rows.level[wrong] == level).sum()) for level in Severity}
    return {
        "n": int(harmless.sum()),
        "flagged": int(wrong.sum()),
        "categories": dict(sorted(each.items(), key=lambda item: -item[1])),
        "without_category": int((~claimed.any(axis=1)).sum()),
        "levels": {name: n for name, n in levels.items() if n},
    }
