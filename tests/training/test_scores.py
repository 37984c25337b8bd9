"""Figures on literal numbers, worked out by hand."""

from collections.abc import Mapping

import numpy as np
import pytest

from training import scores


def booleans(*values: int) -> scores.Booleans:
    return np.array(values, bool)


def only(figures: Mapping[str, scores.Floats]) -> dict[str, float | None]:
    """Figures of one draw, None where undefined."""
    return {name: scores.number(value) for name, (value,) in figures.items()}


def test_binary_figures() -> None:
    truth, predicted = booleans(1, 1, 1, 0, 0), booleans(1, 1, 0, 1, 0)
    result = only(scores.binary(truth, np.array([0.9, 0.8, 0.3, 0.6, 0.1]), predicted))
    assert result["precision"] == pytest.approx(2 / 3)
    assert result["recall"] == pytest.approx(2 / 3)
    assert result["f1"] == pytest.approx(2 / 3)
    assert result["fpr"] == pytest.approx(1 / 2)
    # Ranked 1 1 0 1 0: precision 1 at recall 1/3 and 2/3, 3/4 at recall 1.
    assert result["auprc"] == pytest.approx((1 + 1 + 0.75) / 3)


def test_ties_share_a_step_of_the_curve() -> None:
    found = scores.average_precision(booleans(1, 0), np.array([0.5, 0.5]))
    assert found == pytest.approx([0.5])


@pytest.mark.parametrize("truth", [booleans(1, 1), booleans(0, 0)])
def test_an_absent_class_is_null(truth: scores.Booleans) -> None:
    result = only(scores.binary(truth, np.array([0.4, 0.6]), booleans(0, 1)))
    assert result["auprc"] is None
    assert result["ece"] is None
    assert (result["fpr"] is None) == bool(truth.all())
    assert (result["f1"] is None) == (not truth.any())


def test_calibration_error() -> None:
    truth = booleans(1, 0, 1, 1)
    # One bin of 0.9 (mean truth 1) and one of 0.1 (mean truth 1/2).
    probabilities = np.array([0.1, 0.1, 0.9, 0.9])
    expected = 0.5 * abs(0.9 - 1) + 0.5 * abs(0.1 - 0.5)
    assert scores.calibration_error(truth, probabilities) == pytest.approx([expected])


@pytest.mark.parametrize(
    ("truth", "predicted", "kappa"),
    [
        ([0, 1, 2, 3], [0, 1, 2, 3], 1.0),
        ([0, 3], [3, 0], -1.0),
        ([0, 3, 0, 3], [0, 0, 3, 3], 0.0),
    ],
)
def test_quadratic_kappa(truth: list[int], predicted: list[int], kappa: float) -> None:
    counts = scores.confusion(np.array(truth), np.array(predicted))
    assert scores.quadratic_kappa(counts) == pytest.approx([kappa])


def test_always_moderate_has_no_kappa_on_unsafe_rows() -> None:
    result = only(scores.severity(np.array([1, 2, 3, 2, 0]), np.array([2, 2, 2, 2, 0])))
    assert result["severity_qwk_unsafe"] == pytest.approx(0.0)
    # F1 of level 2: 2·2/(4+2) = 2/3; of 1 and 3: 0.
    assert result["severity_macro_f1_unsafe"] == pytest.approx(2 / 9)
    assert result["severity_mae"] == pytest.approx(2 / 5)
    assert result["severe_to_none_rate"] == 0.0


def test_severe_judged_none() -> None:
    result = only(scores.severity(np.array([3, 3, 0]), np.array([0, 3, 0])))
    assert result["severe_to_none_rate"] == 0.5


def test_multilabel() -> None:
    truth = np.array([[1, 0, 0], [1, 1, 0]], bool)
    predicted = np.array([[1, 0, 0], [0, 1, 1]], bool)
    result = only(scores.multilabel(truth, predicted))
    assert result["category_micro_f1"] == pytest.approx(2 * 2 / (3 + 3))
    # The third category never occurs: it is left out of the mean.
    assert result["category_macro_f1"] == pytest.approx((2 / 3 + 1) / 2)


def test_nothing_to_grade_is_null() -> None:
    empty = np.array([], np.int64)
    assert set(only(scores.severity(empty, empty)).values()) == {None}


@pytest.mark.parametrize("weights", [[2, 0, 1, 3, 1], [1, 1, 0, 0, 1], [0, 0, 0, 0, 2]])
def test_a_weight_is_how_often_a_row_stands_there(weights: list[int]) -> None:
    truth, predicted = booleans(1, 1, 0, 0, 1), booleans(1, 0, 1, 0, 0)
    probability = np.array([0.9, 0.4, 0.6, 0.4, 0.2])
    levels, judged = np.array([3, 1, 0, 0, 2]), np.array([2, 0, 1, 0, 0])
    labels = np.eye(5, 19, dtype=bool)
    claimed = np.roll(labels, 1, axis=0) | labels
    rows = np.repeat(np.arange(5), weights)
    drawn = np.array([weights, [1] * 5], float)

    def measured(rows: scores.Integers, drawn: scores.Floats | None) -> dict[str, scores.Floats]:
        return (
            scores.binary(truth[rows], probability[rows], predicted[rows], drawn)
            | scores.severity(levels[rows], judged[rows], drawn)
            | scores.multilabel(labels[rows], claimed[rows], drawn)
            | {"median": scores.percentile(probability[rows], 0.5, drawn)}
        )

    weighted, repeated, once = (
        measured(np.arange(5), drawn),
        measured(rows, None),
        measured(np.arange(5), None),
    )
    for name, (first, second) in weighted.items():
        assert first == pytest.approx(repeated[name][0], nan_ok=True), name
        assert second == pytest.approx(once[name][0], nan_ok=True), name


def test_reports_are_rounded_at_every_depth() -> None:
    assert scores.rounded({"a": 0.123456, "b": {"c": [0.98765, 3]}, "d": None}) == {
        "a": 0.1235,
        "b": {"c": [0.9877, 3]},
        "d": None,
    }
