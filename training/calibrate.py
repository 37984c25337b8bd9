"""Fits a role's calibration, so that 0.5 is the operating point of every column.

An operating point is chosen over several sets of texts, each of which counts as its weight says,
however many rows it has: no one kind of traffic decides alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Final

import numpy as np
from numpy.typing import NDArray

from models.calibration import Calibration
from models.guard import CATEGORY_COLUMNS, COLUMNS, SEVERITY_COLUMNS, SIGNAL_COLUMNS, Logits
from training import scores

Floats = NDArray[np.float64]
Booleans = NDArray[np.bool_]

_FEWEST: Final = 25
"""A column with fewer positives or negatives keeps the network's own scale."""
_STEEPEST_SLOPE: Final = 1.0
"""That of a Bonferroni correction: a steeper one would let single harmful passages go."""
_FEWEST_WINDOWS: Final = 4
"""The slope of shorter texts is noise: the logarithm of their windows is small."""


@dataclass(frozen=True, slots=True)
class CalibrationRows:
    """One set: logits and targets of shape (n, ``COLUMNS``); a target is 0, 1 or NaN."""

    logits: Logits
    targets: Floats
    weight: float = 1.0

    def column(self, column: int) -> tuple[Floats, Booleans]:
        """The scores and labels of the rows that are labelled in ``column``."""
        labelled = ~np.isnan(self.targets[:, column])
        return (
            self.logits[labelled, column].astype(np.float64),
            self.targets[labelled, column] > 0,
        )


def fit(sets: Sequence[CalibrationRows]) -> Calibration:
    """The calibration under which 0.5 is where the mean of the sets' F1 is best.

    Scales are Platt's (logistic regression over all rows). The three severities share the first
    one's, so that they stay ordered; the second and third cut are those of ``severity_cuts``.
    Categories are cut on the rows that are harmful or are flagged: nowhere else do they fire.
    """
    scale, bias = np.ones(COLUMNS), np.zeros(COLUMNS)
    unsafe = best_cut_of_sets([(*part.column(0), part.weight) for part in sets])
    joined = CalibrationRows(
        np.concatenate([part.logits for part in sets]),
        np.concatenate([part.targets for part in sets]),
    )
    cuts = np.zeros(COLUMNS)
    cuts[0] = unsafe
    scale[SEVERITY_COLUMNS] = platt_scale(*joined.column(0))
    cuts[1:3] = severity_cuts(joined, unsafe)
    relevant = (joined.targets[:, 0] > 0) | (joined.logits[:, 0] >= unsafe)
    harmful = CalibrationRows(joined.logits[relevant], joined.targets[relevant])
    for columns, rows in ((CATEGORY_COLUMNS, harmful), (SIGNAL_COLUMNS, joined)):
        for column in range(columns.start, columns.stop):
            values, truth = rows.column(column)
            if min(truth.sum(), (~truth).sum()) >= _FEWEST:
                scale[column] = platt_scale(values, truth)
                cuts[column] = best_cut(values, truth)
    return Calibration(tuple(scale.tolist()), tuple((bias - scale * cuts).tolist()))


def best_cut_of_sets(sets: Sequence[tuple[Floats, Booleans, float]]) -> float:
    """The score at which flagging is best in the weighted mean over sets of scores and labels.

    A set with harmful rows counts by its F1, one without by its share of rows left alone.
    """

    def value(cut: float) -> float:
        total = weights = 0.0
        for values, truth, weight in sets:
            if len(truth):
                flagged = values >= cut
                f1 = scores.f1(truth, flagged) if truth.any() else 1 - flagged.mean()
                total += weight * float(f1 or 0.0)
                weights += weight
        return total / weights if weights else 0.0

    candidates = np.unique(np.quantile(np.concatenate([s for s, _, _ in sets]), _GRID))
    return _middle_of_best(candidates, value)


def best_cut(values: Floats, truth: Booleans) -> float:
    """The score at which flagging gives the best F1."""
    return best_cut_of_sets([(values, truth, 1.0)])


def severity_cuts(rows: CalibrationRows, unsafe: float) -> tuple[float, float]:
    """Cuts of P(>= 2) and P(>= 3) for the best level of the truly harmful rows.

    Best is the mean of quadratic kappa and of the macro-F1 over the three levels, where rows below
    the cut ``unsafe`` count as none. The cuts stay at 0 where there are too few rows of a level.
    """
    first, second, third = (rows.targets[:, column] for column in (0, 1, 2))
    graded = (first > 0) & ~np.isnan(second) & ~np.isnan(third)
    truth = (1 + second[graded] + third[graded]).astype(np.int64)
    if min(np.sum(truth == level) for level in (1, 2, 3)) < _FEWEST:
        return 0.0, 0.0
    logits = rows.logits[graded].astype(np.float64)
    flagged = logits[:, 0] >= unsafe
    best, cuts = -1.0, (0.0, 0.0)
    grid = (np.quantile(logits[:, column], _COARSE_GRID).tolist() for column in (1, 2))
    for moderate, severe in product(*grid):
        at_least_two = flagged & (logits[:, 1] >= moderate)
        at_least_three = at_least_two & (logits[:, 2] >= severe)
        level = np.array([flagged, at_least_two, at_least_three]).sum(axis=0)
        found = scores.severity(truth, np.asarray(level, np.int64))
        parts = (found["severity_qwk_unsafe"], found["severity_macro_f1_unsafe"])
        value = sum(scores.number(part[0]) or 0.0 for part in parts)
        if value > best:
            best, cuts = value, (moderate, severe)
    return cuts


def window_slope(
    log_odds: Sequence[Floats], windows: Sequence[NDArray[np.int64]], most: Sequence[float]
) -> float:
    """The least slope under which long harmless texts are flagged no more often than ``most``.

    For each length of text, ``log_odds`` holds the calibrated log-odds of harm of each text's
    worst window, ``windows`` how many windows it has, ``most`` the share that may be flagged.
    """
    slope = 0.0
    for odds, counts, share in zip(log_odds, windows, most, strict=True):
        long = counts >= _FEWEST_WINDOWS
        if not long.any():
            continue
        # The slope at which each text would just be flagged; all but ``share`` must lie below.
        needed = np.sort(odds[long] / np.log(counts[long]))
        kept = int(np.ceil(len(needed) * (1 - share))) - 1
        slope = max(slope, float(needed[kept]) + 1e-6)
    return min(slope, _STEEPEST_SLOPE)


def platt_scale(values: Floats, truth: Booleans) -> float:
    """Slope of the logistic regression of ``truth`` on ``values``, by Newton's method.

    Bounded to 0.2–5: a steeper or flatter slope is a sign of too little data.
    """
    slope, intercept = 1.0, 0.0
    for _ in range(50):
        p = 1 / (1 + np.exp(-np.clip(slope * values + intercept, -30, 30)))
        error, weight = truth - p, p * (1 - p)
        gradient = np.array([error @ values, error.sum()])
        hessian = (
            np.array([[weight @ values**2, weight @ values], [weight @ values, weight.sum()]])
            + np.eye(2) * 1e-3
        )
        step = np.linalg.solve(hessian, gradient)
        slope, intercept = slope + step[0], intercept + step[1]
        if np.abs(step).max() < 1e-6:
            break
    return float(np.clip(slope, 0.2, 5.0))


_GRID: Final = np.linspace(0, 1, 401)
_COARSE_GRID: Final = np.linspace(0, 0.995, 60)


def _middle_of_best(
    candidates: Floats, value: Callable[[float], float], slack: float = 0.003
) -> float:
    """The middle of all candidates within ``slack`` of the best, which noise moves less."""
    values = np.array([value(cut) for cut in candidates])
    good = np.flatnonzero(values >= values.max() - slack)
    return float(np.mean([candidates[good[0]], candidates[good[-1]]]))
