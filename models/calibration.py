"""From raw logits to calibrated probabilities, pure.

Each role has its own affine map of the logits (Platt scaling), fitted so that 0.5 is the operating
point of every column: nothing else in the project holds a threshold.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from models.guard import COLUMNS, SEVERITY_COLUMNS, Logits


@dataclass(frozen=True, slots=True)
class Calibration:
    """Probability of column j = sigmoid(scale[j] * logit[j] + bias[j]); ``COLUMNS`` of each.

    Raises ``ValueError`` on a wrong length, a number that is not finite, or a scale that is not
    positive (it would turn the order of texts round).
    """

    scale: tuple[float, ...]
    bias: tuple[float, ...]

    def __post_init__(self) -> None:
        for name, numbers in (("scale", self.scale), ("bias", self.bias)):
            if len(numbers) != COLUMNS or not np.all(np.isfinite(numbers)):
                raise ValueError(f"calibration {name} must be {COLUMNS} finite numbers")
        if min(self.scale) <= 0:
            raise ValueError("calibration scale must be positive")

    @classmethod
    def identity(cls) -> Calibration:
        """Leaves the network's own probabilities as they are."""
        return cls((1.0,) * COLUMNS, (0.0,) * COLUMNS)

    def probabilities(self, logits: Logits) -> NDArray[np.float64]:
        """Calibrated probabilities, shape (n, ``COLUMNS``), of ``logits`` of that shape.

        The three severities never increase from left to right.
        """
        scaled = np.asarray(logits, np.float64) * np.array(self.scale) + np.array(self.bias)
        # Beyond ±40 the sigmoid is 0 or 1 in double precision, and exp would overflow.
        result: NDArray[np.float64] = 1.0 / (1.0 + np.exp(-np.clip(scaled, -40.0, 40.0)))
        severity = result[:, SEVERITY_COLUMNS]
        np.minimum.accumulate(severity, axis=1, out=severity)
        return result
