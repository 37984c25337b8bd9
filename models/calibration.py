"""From raw logits to calibrated probabilities, pure.

Each role has its own affine map of the logits (Platt scaling), fitted so that 0.5 is the operating
point of every column: nothing else in the project holds a threshold.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from models.guard import COLUMNS, SEVERITY_COLUMNS, Logits


@dataclass(frozen=True)
class Calibration:
    """Probability j: sigmoid(scale[j] * logit[j] + bias[j] - window_slope * ln(windows)).

    ``logit`` is the highest of a text's windows. The more windows a text has, the more chances
    there are that a harmless one scores high: each column must then be surer of itself. ``scale``
    and ``bias`` have ``COLUMNS`` entries. Raises ``ValueError`` on a wrong length, a number that
    is not finite, a scale that is not positive (it would turn the order of texts round) or a
    slope below 0.
    """

    scale: tuple[float, ...]
    bias: tuple[float, ...]
    window_slope: float = 0.0

    def __post_init__(self) -> None:
        for name, numbers in (("scale", self.scale), ("bias", self.bias)):
            if len(numbers) != COLUMNS or not np.all(np.isfinite(numbers)):
                raise ValueError(f"calibration {name} must be {COLUMNS} finite numbers")
        if min(self.scale) <= 0:
            raise ValueError("calibration scale must be positive")
        if not (np.isfinite(self.window_slope) and self.window_slope >= 0):
            raise ValueError("calibration window_slope must be a finite number of at least 0")

    @classmethod
    def identity(cls) -> Calibration:
        """Leaves the network's own probabilities as they are."""
        return cls((1.0,) * COLUMNS, (0.0,) * COLUMNS)

    def probabilities(
        self, logits: Logits, windows: int | NDArray[np.int64] = 1
    ) -> NDArray[np.float64]:
        """Calibrated probabilities, shape (n, ``COLUMNS``), of ``logits`` of that shape.

        ``windows`` is how many windows each text had, one number for all or shape (n,). The three
        severities never increase from left to right.
        """
        scale, bias = self._arrays
        penalty = self.window_slope * np.log(np.asarray(windows, np.float64)).reshape(-1, 1)
        scaled = np.asarray(logits, np.float64) * scale + bias - penalty
        # Beyond ±40 the sigmoid is 0 or 1 in double precision, and exp would overflow.
        result: NDArray[np.float64] = 1.0 / (1.0 + np.exp(-np.clip(scaled, -40.0, 40.0)))
        severity = result[:, SEVERITY_COLUMNS]
        np.minimum.accumulate(severity, axis=1, out=severity)
        return result

    @cached_property
    def _arrays(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        return np.array(self.scale), np.array(self.bias)
