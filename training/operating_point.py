"""Where 0.5 lies for a fitted guard: what its calibration is fitted on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Final

import numpy as np
from numpy.typing import NDArray

from models.calibration import Calibration
from models.guard import Logits
from models.inputs import GuardInput, Turn, Window, Windows
from models.taxonomy import ROLES, Role
from training import calibrate, signals
from training.calibrate import CalibrationRows
from training.documents import document
from training.guard_recipe import GuardConfig
from training.labelled import read_examples
from training.mix import Mix, Row, unseen_answers
from training.split import CALIBRATION_SHARE, position
from training.targets import label_matrix

Score = Callable[[Sequence[Window]], Logits]
Prepare = Callable[[GuardInput], Windows]

# Characters of long harmless texts, how many of each, and the share that may be flagged: a little
# under what is aimed at (3%, 5%).
DOCUMENTS: Final = ((8_000, 80, 0.02), (100_000, 12, 0.04))


@dataclass(frozen=True, slots=True)
class Pooled:
    """Texts' logits, each column of their worst window, shape (n, ``COLUMNS``)."""

    logits: Logits
    windows: NDArray[np.int64]
    """How many windows each had."""


@dataclass(frozen=True, slots=True)
class JudgedRows:
    """Rows with their pooled logits."""

    rows: Sequence[Row]
    pooled: Pooled

    def calibration_rows(self, role: Role, weight: float) -> CalibrationRows:
        """Those of ``role``."""
        chosen = [n for n, row in enumerate(self.rows) if row.example.role == role]
        targets = label_matrix([self.rows[n] for n in chosen]).astype(np.float64)
        return CalibrationRows(self.pooled.logits[chosen], targets, weight)


def pool(prepare: Prepare, score: Score, items: Sequence[GuardInput]) -> Pooled:
    """Judges ``items`` by all their windows."""
    prepared = [prepare(item).windows for item in items]
    counts = np.array([len(windows) for windows in prepared], np.int64)
    logits = score(list(chain.from_iterable(prepared)))
    starts = np.cumsum(counts) - counts
    pooled = np.maximum.reduceat(logits, starts, axis=0) if len(counts) else logits
    return Pooled(pooled, counts)


def calibrations(
    config: GuardConfig, mix: Mix, held_out: JudgedRows, prepare: Prepare, score: Score
) -> dict[Role, Calibration]:
    """By role, on the rows held out of the mix and the calibration halves of the recipe's sets."""
    sets = [(held_out, 1.0)]
    for one in config.calibration:
        rows = [
            Row(example, signals.label(example, None))
            for example in read_examples(config.data / one.file)
            if example.text.strip() and position(example.prompt) < CALIBRATION_SHARE
        ]
        items = [row.example.guard_input() for row in rows]
        sets.append((JudgedRows(rows, pool(prepare, score, items)), one.weight))
    result: dict[Role, Calibration] = {}
    for role in ROLES:
        parts = [judged.calibration_rows(role, weight) for judged, weight in sets]
        parts = [part for part in parts if len(part.column(0)[1])]
        if not parts:
            # Nothing labelled this role: the network's own scale stands.
            result[role] = Calibration.identity()
            continue
        fitted = calibrate.fit(parts)
        slope = _window_slope(config, mix, role, fitted, prepare, score)
        result[role] = replace(fitted, window_slope=slope)
    return result


def _window_slope(
    config: GuardConfig,
    mix: Mix,
    role: Role,
    calibration: Calibration,
    prepare: Prepare,
    score: Score,
) -> float:
    answers = unseen_answers(config.data, config.mixes, mix)
    if not answers:
        return 0.0
    generator = np.random.default_rng(config.seed)
    odds, windows = [], []
    for characters, count, _ in DOCUMENTS:
        context = () if role == "prompt" else (Turn("user", "Go on."),)
        items = [
            GuardInput(role, document(answers, characters, generator), context)
            for _ in range(count)
        ]
        pooled = pool(prepare, score, items)
        logits = pooled.logits[:, 0].astype(np.float64)
        odds.append(logits * calibration.scale[0] + calibration.bias[0])
        windows.append(pooled.windows)
    return calibrate.window_slope(odds, windows, [most for _, _, most in DOCUMENTS])
