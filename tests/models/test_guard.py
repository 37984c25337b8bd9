"""How rows are packed into batches, and that sharing a batch changes nothing."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.calibration import Calibration
from models.guard import COLUMNS, pack


@given(st.lists(st.integers(1, 300), max_size=60), st.integers(256, 2048))
def test_every_row_is_in_one_batch_within_the_budget(lengths: list[int], budget: int) -> None:
    batches = list(pack(lengths, budget))
    assert sorted(row for rows in batches for row in rows) == list(range(len(lengths)))
    for rows in batches:
        assert len(rows) == 1 or len(rows) * max(lengths[row] for row in rows) <= budget


def test_rows_of_like_length_share_a_batch() -> None:
    assert list(pack([250, 10, 240, 12], 512)) == [[1, 3], [2, 0]]


class TestCalibration:
    IDENTITY = Calibration.identity()

    def test_zero_logits_are_at_the_operating_point(self) -> None:
        assert np.all(self.IDENTITY.probabilities(np.zeros((2, COLUMNS), np.float32)) == 0.5)

    def test_severities_never_increase_whatever_the_bias(self) -> None:
        bias = (0.0, 3.0, 6.0, *(0.0,) * (COLUMNS - 3))
        steep = Calibration((1.0,) * COLUMNS, bias)
        (row,) = steep.probabilities(np.zeros((1, COLUMNS), np.float32))
        assert row[0] == row[1] == row[2] == 0.5

    def test_huge_logits_do_not_overflow(self) -> None:
        high, low = self.IDENTITY.probabilities(
            np.array([[1e30] * COLUMNS, [-1e30] * COLUMNS], np.float32)
        )
        assert np.allclose(high, 1.0)
        assert np.allclose(low, 0.0)

    @pytest.mark.parametrize(
        ("scale", "bias"),
        [
            ((1.0,) * (COLUMNS - 1), (0.0,) * COLUMNS),
            ((1.0,) * COLUMNS, (float("nan"),) * COLUMNS),
            ((-1.0,) * COLUMNS, (0.0,) * COLUMNS),
        ],
    )
    def test_numbers_that_make_no_calibration_are_refused(
        self, scale: tuple[float, ...], bias: tuple[float, ...]
    ) -> None:
        with pytest.raises(ValueError, match="calibration"):
            Calibration(scale, bias)
