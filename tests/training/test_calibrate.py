"""The calibration puts the best cut of every column at 0.5."""

import numpy as np
import pytest

from models.guard import COLUMNS
from training.calibrate import (
    CalibrationRows,
    best_cut,
    best_cut_of_sets,
    fit,
    platt_scale,
    severity_cuts,
    window_slope,
)


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
    logits = generator.normal(size=(4000, COLUMNS)).astype(np.float32)
    logits[:, :3] = -np.sort(-logits[:, :3], axis=1)
    targets = (logits > 1.0).astype(np.float64)
    targets[:, 5] = np.nan
    calibration = fit([CalibrationRows(logits, targets)])
    probabilities = calibration.probabilities(logits)
    right = (probabilities >= 0.5) == (targets > 0)
    labelled = ~np.isnan(targets)
    assert right[labelled].mean() > 0.98
    assert np.all(np.diff(probabilities[:, :3], axis=1) <= 0)
    # Without labels the network's own scale stays.
    assert (calibration.scale[5], calibration.bias[5]) == (1.0, 0.0)


def test_a_set_counts_as_its_weight_says_and_not_by_its_rows() -> None:
    many = (np.repeat([0.0, 1.0], 500), np.repeat([False, True], 500))
    few = (np.array([1.0, 1.5, 2.0]), np.array([False, False, True]))
    assert best_cut_of_sets([(*many, 5.0), (*few, 1.0)]) <= 1.0
    assert best_cut_of_sets([(*many, 1.0), (*few, 5.0)]) > 1.5


def test_a_set_without_harm_counts_by_what_is_left_alone() -> None:
    mixed = (np.array([0.0, 1.0, 2.0, 3.0]), np.array([False, False, True, True]))
    harmless = (np.full(10, 2.5), np.zeros(10, bool))
    assert best_cut_of_sets([(*mixed, 1.0)]) <= 2.0
    assert 2.5 < best_cut_of_sets([(*mixed, 1.0), (*harmless, 3.0)]) <= 3.0


def test_the_severity_cuts_tell_the_levels_of_harmful_rows_apart() -> None:
    level = np.repeat([0, 1, 2, 3], 30)
    targets = np.full((120, COLUMNS), np.nan)
    logits = np.zeros((120, COLUMNS), np.float32)
    for column in range(3):
        targets[:, column] = level > column
        logits[:, column] = level - 4.0 * column
    moderate, severe = severity_cuts(CalibrationRows(logits, targets), unsafe=1.0)
    assert -3.0 < moderate <= -2.0
    assert -6.0 < severe <= -5.0


def test_too_few_graded_rows_leave_the_severity_cuts_alone() -> None:
    targets = np.full((120, COLUMNS), np.nan)
    targets[:, 0] = 1
    assert severity_cuts(CalibrationRows(np.zeros((120, COLUMNS), np.float32), targets), 0) == (
        0,
        0,
    )


@pytest.mark.parametrize(
    ("odds", "most", "expected"),
    [
        ([-3.0, -2.0, -1.0, -0.5], 0.0, 0.0),
        ([-3.0, -2.0, -1.0, 2.0], 0.0, 2.0 / np.log(10)),
        ([-3.0, -2.0, -1.0, 2.0], 0.25, 0.0),
        ([-3.0, -2.0, -1.0, 9.0], 0.0, 1.0),
    ],
    ids=["none flagged", "one flagged", "one may be", "bounded"],
)
def test_the_window_slope_is_the_least_that_leaves_long_harmless_texts_alone(
    odds: list[float], most: float, expected: float
) -> None:
    slope = window_slope([np.array(odds)], [np.full(4, 10)], [most])
    assert slope == pytest.approx(expected, abs=1e-4)


def test_texts_of_few_windows_do_not_set_the_slope() -> None:
    assert window_slope([np.array([2.0])], [np.array([2])], [0.0]) == 0.0
