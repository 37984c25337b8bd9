"""Stand-in guards that judge by marker words, through the real inputs and batches."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

import numpy as np

from models.calibration import Calibration
from models.guard import CATEGORY_COLUMNS, COLUMNS, SEVERITY_COLUMNS, SIGNAL_COLUMNS, Logits
from models.inputs import GuardInput, InputEncoder, Window, Windows
from models.taxonomy import CATEGORIES, Severity
from models.verdict import Verdict
from tests.models.tokenizers import word_tokenizer

_MARKER: Final = re.compile(r"\b(minor|moderate|severe)-([a-z_]+)")


class WordGuard:
    """``severe-violence`` in a text makes it severe, in the category violence; other texts are safe."""

    id = "words-1"

    def __init__(self) -> None:
        self._encoder = InputEncoder(word_tokenizer())

    def prepare(self, item: GuardInput) -> Windows:
        return self._encoder.encode(item)

    def score(self, windows: Sequence[Window]) -> Logits:
        return np.full((len(windows), COLUMNS), -5.0, np.float32)

    def conclude(self, item: GuardInput, prepared: Windows, logits: Logits) -> Verdict:
        if not np.all(np.isfinite(logits)):
            raise ValueError("the guard's output is not finite")
        pooled = logits.max(axis=0, keepdims=True).copy()
        for level, category in _MARKER.findall(item.text):
            pooled[0, : Severity.from_label(level)] = 5.0
            pooled[0, CATEGORY_COLUMNS.start + CATEGORIES.index(category)] = 5.0
        (row,) = Calibration.identity().probabilities(pooled).tolist()
        minor, moderate, severe = row[SEVERITY_COLUMNS]
        return Verdict(
            item.role,
            (minor, moderate, severe),
            tuple(row[CATEGORY_COLUMNS]),
            tuple(row[SIGNAL_COLUMNS]),
            prepared.coverage,
        )


class BrokenGuard(WordGuard):
    """Cannot judge a text that holds the word poison."""

    def conclude(self, item: GuardInput, prepared: Windows, logits: Logits) -> Verdict:
        if "poison" in item.text:
            raise ValueError("the guard's output is not finite")
        return super().conclude(item, prepared, logits)
