"""What an evaluation reports, as pure functions of labels and predictions.

Fractions of 1; None where a figure is undefined because a class is absent.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Booleans = NDArray[np.bool_]
Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


def ratio(numerator: float, denominator: float) -> float | None:
    """``numerator / denominator``, or None where the denominator is zero."""
    return float(numerator / denominator) if denominator else None


def f1(truth: Booleans, predicted: Booleans) -> float | None:
    """F1 of the positive class; None without a positive in ``truth``."""
    if not truth.any():
        return None
    hits = float(np.sum(truth & predicted))
    return 2 * hits / float(truth.sum() + predicted.sum())


def binary(truth: Booleans, scores: Floats, predicted: Booleans) -> dict[str, float | None]:
    """F1, precision, recall, false-positive rate, AUPRC and calibration error of one class."""
    hits = float(np.sum(truth & predicted))
    return {
        "f1": f1(truth, predicted),
        "precision": ratio(hits, float(predicted.sum())) if truth.any() else None,
        "recall": ratio(hits, float(truth.sum())),
        "fpr": ratio(float(np.sum(~truth & predicted)), float(np.sum(~truth))),
        "auprc": average_precision(truth, scores),
        "ece": calibration_error(truth, scores),
    }


def average_precision(truth: Booleans, scores: Floats) -> float | None:
    """Area under the precision-recall curve by steps; ties share one step."""
    if not truth.any() or truth.all():
        return None
    order = np.argsort(-scores, kind="stable")
    ranked, positives = scores[order], truth[order]
    last_of_tie = np.append(ranked[1:] != ranked[:-1], True)
    hits = np.cumsum(positives)[last_of_tie]
    taken = np.flatnonzero(last_of_tie) + 1
    recall = hits / truth.sum()
    return float(np.sum(np.diff(recall, prepend=0.0) * hits / taken))


def calibration_error(truth: Booleans, scores: Floats, bins: int = 15) -> float | None:
    """Expected calibration error over equally wide bins."""
    if not truth.any() or truth.all():
        return None
    bin_of = np.minimum((scores * bins).astype(int), bins - 1)
    total = 0.0
    for number in range(bins):
        inside = bin_of == number
        if inside.any():
            total += inside.mean() * abs(scores[inside].mean() - truth[inside].mean())
    return float(total)


def quadratic_kappa(truth: Integers, predicted: Integers, levels: int = 4) -> float | None:
    """Quadratic weighted kappa; None where chance agreement is already perfect."""
    observed = np.zeros((levels, levels))
    np.add.at(observed, (truth, predicted), 1)
    weights = np.subtract.outer(np.arange(levels), np.arange(levels)) ** 2
    expected = np.outer(observed.sum(1), observed.sum(0)) / max(len(truth), 1)
    disagreement = float(np.sum(weights * expected))
    if not disagreement:
        return None
    return 1.0 - float(np.sum(weights * observed)) / disagreement


def severity(truth: Integers, predicted: Integers) -> dict[str, float | None]:
    """Ordinal agreement over all rows and over the truly unsafe ones."""
    unsafe = truth > 0
    severe = truth == 3
    by_level = [f1(truth[unsafe] == k, predicted[unsafe] == k) for k in (1, 2, 3)]
    present = [value for value in by_level if value is not None]
    return {
        "severity_qwk": quadratic_kappa(truth, predicted),
        "severity_qwk_unsafe": quadratic_kappa(truth[unsafe], predicted[unsafe]),
        "severity_macro_f1_unsafe": float(np.mean(present)) if present else None,
        "severity_mae": float(np.abs(truth - predicted).mean()) if len(truth) else None,
        "severe_to_none_rate": ratio(float(np.sum(predicted[severe] == 0)), float(severe.sum())),
    }


def multilabel(truth: Booleans, predicted: Booleans) -> dict[str, float | None]:
    """Micro- and macro-F1 over categories; both arrays have shape (rows, categories).

    The macro mean is over the categories that occur in ``truth``.
    """
    each = [f1(truth[:, column], predicted[:, column]) for column in range(truth.shape[1])]
    present = [value for value in each if value is not None]
    return {
        "category_micro_f1": f1(truth.ravel(), predicted.ravel()),
        "category_macro_f1": float(np.mean(present)) if present else None,
    }


def rounded(report: Mapping[str, Any], digits: int = 4) -> dict[str, Any]:
    """The report with its floats rounded, for people and for JSON."""
    return {
        key: round(value, digits) if isinstance(value, float) else value
        for key, value in report.items()
    }
