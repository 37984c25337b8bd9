"""Many texts through a guard, with word of how far it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from models.guard import Guard, judge
from models.inputs import GuardInput
from models.taxonomy import Severity
from models.verdict import Verdict
from training.scores import Booleans

Progress = Callable[[int], None]
"""Told how many more texts are judged."""
Bars = Callable[[str, int], Progress]
"""Begins a part of the work, by its name and how many texts it judges."""

_CHUNK = 256


def unseen(_: int) -> None:
    """Progress that nobody watches."""


def judge_all(
    guard: Guard, items: Sequence[GuardInput], progress: Progress = unseen
) -> list[Verdict]:
    """Verdicts on all items, in their order."""
    verdicts: list[Verdict] = []
    for start in range(0, len(items), _CHUNK):
        chunk = items[start : start + _CHUNK]
        verdicts += judge(guard, chunk)
        progress(len(chunk))
    return verdicts


def flags(guard: Guard, items: Sequence[GuardInput], progress: Progress = unseen) -> Booleans:
    """Which items are judged harmful."""
    verdicts = judge_all(guard, items, progress)
    return np.array([verdict.level > Severity.NONE for verdict in verdicts], bool)
