"""The calibration puts the best cut of every column at 0.5."""

import numpy as np
import pytest

from models.guard import COLUMNS
from training.calibrate import best_cut, fit, platt_scale


def test_best_cut_separates_what_can_be_separated() -> None:
    scores = np.array([-2.0, -1.0, 3.0, 4.0])
    assert -1.0 < best_cut(scores, np.array([False, False, True, True])) <= 3.0


def test_platt_scale_finds_the_slope_that_made_the_labels() -> None:
    generator = np.random.default_rng(0)
    scores = generator.normal(size=20_000)
    truth = generator.random(20_000) < 1 / (1 + np.exp(-2.0 * scores))
    assert platt_scale(scores, truth) == pytest.approx(2.0, rel=0.05)


def test_platt_scale_is_bounded_where_classes_are_apart() -> None:
    assert platt_scale(np.array([-1.0, 1.0] * 50), np.array([False, True] * 50)) == 5.0


def test_fit_moves_the_operating_point_of_each_column_and_keeps_severity_ordered() -> None:
    generator = np.random.default_rng(1)
    logits = generator.normal(size=(400, COLUMNS)).astype(np.float32)
    logits[:, :3] = -np.sort(-logits[:, :3], axis=1)
    targets = (logits > 1.0).astype(np.float64)
    targets[:, 5] = np.nan
    calibration = fit(logits, targets)
    probabilities = calibration.probabilities(logits)
    right = (probabilities >= 0.5) == (targets > 0)
    labelled = ~np.isnan(targets)
    assert right[labelled].mean() > 0.98
    assert np.all(np.diff(probabilities[:, :3], axis=1) <= 0)
    # Without labels the network's own scale stays.
    assert (calibration.scale[5], calibration.bias[5]) == (1.0, 0.0)
