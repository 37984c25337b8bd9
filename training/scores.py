"""What an evaluation reports, as pure functions of labels, predictions and weights.

``weights`` says how often each row counts, shape (draws, rows), so that the resamples of a
bootstrap are measured at once; without it every row counts once, and there is one draw. Figures
are arrays of shape (draws,): fractions of 1, NaN where undefined because a class is absent.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.taxonomy import Severity

Booleans = NDArray[np.bool_]
Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

LEVELS = len(Severity)


def ratio(numerator: Floats, denominator: Floats) -> Floats:
    """``numerator / denominator``, NaN where the denominator is zero; shapes broadcast."""
    result: Floats = np.full(np.broadcast_shapes(numerator.shape, denominator.shape), np.nan)
    np.divide(numerator, denominator, out=result, where=denominator != 0)
    return result


def f1(truth: Booleans, predicted: Booleans) -> float | None:
    """F1 of the positive class where each row counts once; None without a positive in ``truth``."""
    return number(rates(truth, predicted)["f1"][0])


def rates(truth: Booleans, predicted: Booleans, weights: Floats | None = None) -> dict[str, Floats]:
    """F1, precision, recall and false-positive rate of one class."""
    weights = _weights(truth, weights)
    positives, claimed = weights @ truth, weights @ predicted
    hits = weights @ (truth & predicted)
    exists = np.where(positives > 0, 1.0, np.nan)
    return {
        "f1": exists * ratio(2 * hits, positives + claimed),
        "precision": exists * ratio(hits, claimed),
        "recall": ratio(hits, positives),
        "fpr": ratio(claimed - hits, weights.sum(axis=1) - positives),
    }


def binary(
    truth: Booleans, scores: Floats, predicted: Booleans, weights: Floats | None = None
) -> dict[str, Floats]:
    """``rates``, with AUPRC and calibration error."""
    return rates(truth, predicted, weights) | {
        "auprc": average_precision(truth, scores, weights),
        "ece": calibration_error(truth, scores, weights),
    }


def average_precision(truth: Booleans, scores: Floats, weights: Floats | None = None) -> Floats:
    """Area under the precision-recall curve by steps; ties share one step."""
    weights = _weights(truth, weights)
    order = np.argsort(-scores, kind="stable")
    ranked, positives = scores[order], truth[order]
    last_of_tie = np.append(ranked[1:] != ranked[:-1], True)[: len(ranked)]
    hits = np.cumsum(weights[:, order] * positives, axis=1)[:, last_of_tie]
    taken = np.cumsum(weights[:, order], axis=1)[:, last_of_tie]
    # A step that no drawn row takes has no precision, and no width.
    steps = np.diff(hits, axis=1, prepend=0.0) * ratio(hits, np.maximum(taken, 1.0))
    return _where_both(truth, weights, ratio(steps.sum(axis=1), weights @ truth))


def calibration_error(
    truth: Booleans, scores: Floats, weights: Floats | None = None, bins: int = 15
) -> Floats:
    """Expected calibration error over equally wide bins."""
    weights = _weights(truth, weights)
    gaps = weights @ (in_bins(scores, bins) * (scores - truth)[:, None])
    return _where_both(truth, weights, ratio(np.abs(gaps).sum(axis=1), weights.sum(axis=1)))


def in_bins(scores: Floats, bins: int) -> Booleans:
    """Which of ``bins`` equally wide parts of 0–1 each score is in; shape (rows, bins)."""
    bin_of: Integers = np.minimum((scores * bins).astype(np.int64), bins - 1)
    return np.equal(bin_of[:, None], np.arange(bins))


def confusion(truth: Integers, predicted: Integers, weights: Floats | None = None) -> Floats:
    """Counts of true and predicted severities, shape (draws, true level, predicted level)."""
    weights = _weights(truth, weights)
    cells = np.equal((truth * LEVELS + predicted)[:, None], np.arange(LEVELS**2))
    counts: Floats = weights @ cells
    return counts.reshape(-1, LEVELS, LEVELS)


def quadratic_kappa(counts: Floats) -> Floats:
    """Quadratic weighted kappa of a ``confusion``; NaN where chance agreement is perfect."""
    distance = np.subtract.outer(np.arange(LEVELS), np.arange(LEVELS)) ** 2
    total = counts.sum(axis=(1, 2))
    expected = counts.sum(axis=2)[:, :, None] * counts.sum(axis=1)[:, None, :]
    chance = np.sum(distance * expected, axis=(1, 2)) / np.maximum(total, 1.0)
    return 1.0 - ratio(np.sum(distance * counts, axis=(1, 2)), chance)


def level_f1(counts: Floats) -> Floats:
    """F1 of each level from minor on, over truly unsafe rows; shape (draws, 3)."""
    unsafe = counts[:, 1:, :]
    hits = np.diagonal(unsafe[:, :, 1:], axis1=1, axis2=2)
    positives, claimed = unsafe.sum(axis=2), unsafe[:, :, 1:].sum(axis=1)
    return np.where(positives > 0, ratio(2 * hits, positives + claimed), np.nan)


def severity(
    truth: Integers, predicted: Integers, weights: Floats | None = None
) -> dict[str, Floats]:
    """Ordinal agreement over all rows and over the truly unsafe ones."""
    counts = confusion(truth, predicted, weights)
    unsafe = counts * (np.arange(LEVELS) > 0)[:, None]
    distance = np.abs(np.subtract.outer(np.arange(LEVELS), np.arange(LEVELS)))
    severe = counts[:, Severity.SEVERE]
    return {
        "severity_qwk": quadratic_kappa(counts),
        "severity_qwk_unsafe": quadratic_kappa(unsafe),
        "severity_macro_f1_unsafe": _mean_of_defined(level_f1(counts)),
        "severity_mae": ratio((distance * counts).sum(axis=(1, 2)), counts.sum(axis=(1, 2))),
        "severe_to_none_rate": ratio(severe[:, Severity.NONE], severe.sum(axis=1)),
    }


def multilabel(
    truth: Booleans, predicted: Booleans, weights: Floats | None = None
) -> dict[str, Floats]:
    """Micro- and macro-F1 over categories; both arrays have shape (rows, categories).

    The macro mean is over the categories that occur in ``truth``.
    """
    weights = _weights(truth, weights)
    positives, claimed = weights @ truth, weights @ predicted
    hits = weights @ (truth & predicted)
    each = np.where(positives > 0, ratio(2 * hits, positives + claimed), np.nan)
    sizes = positives.sum(axis=1) + claimed.sum(axis=1)
    micro = np.where(positives.sum(axis=1) > 0, ratio(2 * hits.sum(axis=1), sizes), np.nan)
    return {"category_micro_f1": micro, "category_macro_f1": _mean_of_defined(each)}


def percentile(values: Floats, share: float, weights: Floats | None = None) -> Floats:
    """The value below which ``share`` of the rows lie; NaN without a row."""
    weights = _weights(values, weights)
    drawn = [np.repeat(values, row.astype(int)) for row in weights]
    return np.array([np.quantile(row, share) if len(row) else np.nan for row in drawn])


def number(value: float) -> float | None:
    """For JSON, which has no NaN."""
    return None if np.isnan(value) else float(value)


def rounded(report: Any, digits: int = 4) -> Any:
    """The report with its floats rounded, at every depth, for people and for JSON."""
    if isinstance(report, dict):
        return {key: rounded(value, digits) for key, value in report.items()}
    if isinstance(report, list | tuple):
        return [rounded(value, digits) for value in report]
    return round(report, digits) if isinstance(report, float) else report


def _weights(rows: NDArray[Any], weights: Floats | None) -> Floats:
    return np.ones((1, len(rows))) if weights is None else weights


def _where_both(truth: Booleans, weights: Floats, values: Floats) -> Floats:
    """``values``, NaN in the draws that lack a class."""
    positives = weights @ truth
    return np.where((positives > 0) & (positives < weights.sum(axis=1)), values, np.nan)


def _mean_of_defined(values: Floats) -> Floats:
    """Means over the last axis, of what is not NaN."""
    defined = ~np.isnan(values)
    return ratio(np.where(defined, values, 0.0).sum(axis=-1), defined.sum(axis=-1).astype(float))
