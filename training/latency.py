"""How long a guard takes on this machine: one text at a time, and many together."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from models.guard import Guard, judge
from models.inputs import GuardInput
from training import scores
from training.bootstrap import Counts, Figures, nested, resampled
from training.scores import Floats

BATCH: Final = 64
_WARM_UP: Final = 5


def measure_latency(
    guard: Guard, items: Sequence[GuardInput], threads: int, *, seed: int = 0
) -> dict[str, Any]:
    """Milliseconds a text at batch 1, texts a second in batches of ``BATCH``, and the machine."""
    judge(guard, items[:_WARM_UP])
    alone = np.array([_seconds(guard, [item]) for item in items]) * 1000
    batches = [items[start : start + BATCH] for start in range(0, len(items), BATCH)]
    sizes = np.array([len(batch) for batch in batches], float)
    seconds = np.array([_seconds(guard, batch) for batch in batches])

    def singles(weights: Floats) -> Figures:
        return {
            ("milliseconds_p50",): scores.percentile(alone, 0.5, weights),
            ("milliseconds_p95",): scores.percentile(alone, 0.95, weights),
        }

    def together(weights: Floats) -> Figures:
        return {("texts_per_second",): scores.ratio(weights @ sizes, weights @ seconds)}

    point: Figures = {}
    draws: Figures = {}
    for measure, rows in ((singles, len(items)), (together, len(batches))):
        point |= measure(np.ones((1, rows)))
        draws |= resampled(measure, [str(row) for row in range(rows)], seed=seed)
    characters = float(np.mean([len(item.text) for item in items]))
    counts: Counts = {("n",): len(items), ("mean_characters",): characters}
    return nested(point, draws, counts) | {"machine": machine() | {"threads": threads}}


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _seconds(guard: Guard, items: Sequence[GuardInput]) -> float:
    start = time.perf_counter()
    judge(guard, items)
    return time.perf_counter() - start
