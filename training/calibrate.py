"""Fits each role's calibration on held-out rows, so that 0.5 is the operating point."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from models.calibration import Calibration
from models.guard import COLUMNS, SEVERITY_COLUMNS, Logits

_FEWEST = 25
"""A column with fewer positives or negatives keeps the network's own scale."""


def fit(logits: Logits, targets: NDArray[np.float64]) -> Calibration:
    """The calibration under which 0.5 gives each column its best F1.

    ``logits`` and ``targets`` have shape (n, ``COLUMNS``); a target is 0, 1 or NaN. The scale is
    Platt's (logistic regression); the bias then moves the best cut to 0.5. The three severities
    share the first one's scale, so that they stay ordered.
    """
    scale, bias = np.ones(COLUMNS), np.zeros(COLUMNS)
    for column in range(COLUMNS):
        labelled = ~np.isnan(targets[:, column])
        truth = targets[labelled, column].astype(bool)
        scores = logits[labelled, column].astype(np.float64)
        if min(truth.sum(), (~truth).sum()) < _FEWEST:
            continue
        scale[column] = platt_scale(scores, truth)
        bias[column] = -scale[column] * best_cut(scores, truth)
    cuts = -bias[SEVERITY_COLUMNS] / scale[SEVERITY_COLUMNS]
    scale[SEVERITY_COLUMNS] = scale[0]
    bias[SEVERITY_COLUMNS] = -scale[0] * cuts
    return Calibration(tuple(scale.tolist()), tuple(bias.tolist()))


def platt_scale(scores: NDArray[np.float64], truth: NDArray[np.bool_]) -> float:
    """Slope of the logistic regression of ``truth`` on ``scores``, by Newton's method.

    Bounded to 0.2–5: a steeper or flatter slope is a sign of too little data.
    """
    slope, intercept = 1.0, 0.0
    for _ in range(50):
        p = 1 / (1 + np.exp(-np.clip(slope * scores + intercept, -30, 30)))
        error, weight = truth - p, p * (1 - p)
        gradient = np.array([error @ scores, error.sum()])
        hessian = (
            np.array([[weight @ scores**2, weight @ scores], [weight @ scores, weight.sum()]])
            + np.eye(2) * 1e-3
        )
        step = np.linalg.solve(hessian, gradient)
        slope, intercept = slope + step[0], intercept + step[1]
        if np.abs(step).max() < 1e-6:
            break
    return float(np.clip(slope, 0.2, 5.0))


def best_cut(scores: NDArray[np.float64], truth: NDArray[np.bool_], slack: float = 0.005) -> float:
    """The score at which flagging gives the best F1.

    Taken as the middle of all cuts within ``slack`` of the best, which noise moves less.
    """
    order = np.argsort(-scores, kind="stable")
    ranked, hits = scores[order], np.cumsum(truth[order])
    f1 = 2 * hits / (np.arange(1, len(order) + 1) + truth.sum())
    good = np.flatnonzero(f1 >= f1.max() - slack)
    return float(np.mean([ranked[good[0]], ranked[good[-1]]]))
