"""Intervals of figures, on cases whose answer is known."""

import numpy as np
import pytest

from training.bootstrap import Figures, interval, measured, nested, resampled
from training.scores import Floats, ratio

VALUES = np.array([1.0] * 30 + [0.0] * 70)


def mean(weights: Floats) -> Figures:
    return {("mean",): ratio(weights @ VALUES, weights.sum(axis=1))}


def test_a_share_of_independent_rows_has_the_binomial_interval() -> None:
    found, _ = measured(mean, [str(row) for row in range(100)], {("n",): 100})
    assert found["n"] == 100
    assert found["mean"] == pytest.approx(0.3)
    # 1.96 standard errors: √(0.3 · 0.7 / 100) = 0.0458.
    assert found["intervals"]["mean"] == pytest.approx((0.21, 0.39), abs=0.011)


def test_rows_of_one_cluster_are_drawn_together() -> None:
    # Ten clusters of ten equal rows are ten observations: √10 times as wide.
    found, _ = measured(mean, [str(row // 10) for row in range(100)], {})
    low, high = found["intervals"]["mean"]
    assert (low, high) == pytest.approx((0.0, 0.6), abs=0.1)


def test_each_resample_has_as_many_clusters_as_there_are() -> None:
    def total(weights: Floats) -> Figures:
        return {("rows",): weights.sum(axis=1), ("pairs",): weights[:, 0] - weights[:, 1]}

    found = resampled(total, ["a", "a", "b", "b"], draws=250)
    assert set(found[("rows",)].tolist()) == {4.0}
    assert set(found[("pairs",)].tolist()) == {0.0}
    assert len(found[("rows",)]) == 250


def test_the_same_seed_gives_the_same_draws() -> None:
    rows = [str(row) for row in range(100)]
    first, again = resampled(mean, rows, seed=1), resampled(mean, rows, seed=1)
    other = resampled(mean, rows, seed=2)
    assert first[("mean",)].tolist() == again[("mean",)].tolist()
    assert first[("mean",)].tolist() != other[("mean",)].tolist()


def test_draws_in_which_a_figure_is_undefined_are_left_out() -> None:
    assert interval(np.array([np.nan, 0.0, 1.0])) == pytest.approx((0.025, 0.975))
    assert interval(np.array([np.nan])) is None


def test_no_row_at_all_is_undefined() -> None:
    def share(weights: Floats) -> Figures:
        return {("share",): ratio(weights.sum(axis=1), weights.sum(axis=1))}

    found, _ = measured(share, [], {})
    assert found == {"share": None, "intervals": {"share": None}}


def test_figures_stand_at_their_paths_after_the_counts() -> None:
    point = {("f1",): np.array([0.5]), ("by_role", "prompt", "f1"): np.array([np.nan])}
    draws = {path: np.array([0.0, 1.0]) for path in point}
    assert nested(point, draws, {("by_role", "prompt", "n"): 3}) == {
        "by_role": {"prompt": {"n": 3, "f1": None, "intervals": {"f1": None}}},
        "f1": 0.5,
        "intervals": {"f1": pytest.approx((0.025, 0.975))},
    }
