"""What a guard is, and how several judgements share its batches.

A judgement has three steps: ``prepare`` (CPU, per input), ``score`` (the device, a batch of
windows of any inputs) and ``conclude`` (CPU, per input). A server overlaps them; ``judge`` runs
them in turn for a list of inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from models.inputs import GuardInput, Window, Windows
from models.taxonomy import CATEGORIES, SIGNALS
from models.verdict import Verdict

Logits = NDArray[np.float32]

SEVERITY_COLUMNS: Final = slice(0, 3)
CATEGORY_COLUMNS: Final = slice(3, 3 + len(CATEGORIES))
SIGNAL_COLUMNS: Final = slice(CATEGORY_COLUMNS.stop, CATEGORY_COLUMNS.stop + len(SIGNALS))
COLUMNS: Final = SIGNAL_COLUMNS.stop
"""Columns of a guard's logits: cumulative severity, then categories, then signals."""

TOKEN_BUDGET: Final = 4096
"""Padded tokens in one batch. It bounds the memory that a batch can take."""


class Guard(Protocol):
    """Judges texts. Methods may be called from several threads, ``score`` from one at a time."""

    @property
    def id(self) -> str:
        """Name and version, as answers and records give it."""

    def prepare(self, item: GuardInput) -> Windows:
        """The windows of ``item``, and what they cover."""

    def score(self, windows: Sequence[Window]) -> Logits:
        """Raw logits, float32 of shape (number of windows, ``COLUMNS``)."""

    def conclude(self, item: GuardInput, prepared: Windows, logits: Logits) -> Verdict:
        """The verdict on ``item`` from the logits of all its windows, in their order.

        Raises ``ValueError`` where a logit is not a finite number.
        """


def pack(lengths: Sequence[int], token_budget: int = TOKEN_BUDGET) -> Iterator[list[int]]:
    """Groups row numbers into batches of at most ``token_budget`` padded tokens.

    Rows of like length share a batch, shortest first, so that little is spent on padding. A row
    longer than the budget is a batch alone.
    """
    batch: list[int] = []
    for row in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) + 1) * lengths[row] > token_budget:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def score_all(
    score: Callable[[Sequence[Window]], Logits],
    windows: Sequence[Window],
    token_budget: int = TOKEN_BUDGET,
) -> Logits:
    """Logits of all windows in their order, shape (n, ``COLUMNS``), scored in packed batches."""
    logits = np.empty((len(windows), COLUMNS), np.float32)
    for rows in pack([len(window) for window in windows], token_budget):
        logits[rows] = score([windows[row] for row in rows])
    return logits


def judge(
    guard: Guard, items: Sequence[GuardInput], token_budget: int = TOKEN_BUDGET
) -> list[Verdict]:
    """Verdicts on ``items``, in their order; blocks until all are judged."""
    prepared = [guard.prepare(item) for item in items]
    windows = [window for one in prepared for window in one.windows]
    logits = score_all(guard.score, windows, token_budget)
    verdicts = []
    start = 0
    for item, one in zip(items, prepared, strict=True):
        stop = start + len(one.windows)
        verdicts.append(guard.conclude(item, one, logits[start:stop]))
        start = stop
    return verdicts
