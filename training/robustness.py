"""What it costs a guard when words are hidden from it: the same prompts, written in other ways."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from models.guard import Guard
from training import scores
from training.bootstrap import Counts, Figures, measured
from training.judging import Progress, flags, unseen
from training.labelled import Example
from training.obfuscation import OBFUSCATIONS
from training.scores import Booleans, Floats
from training.split import normal

PLAIN = "plain"


def measure_robustness(
    guard: Guard, examples: Sequence[Example], progress: Progress = unseen, *, seed: int = 0
) -> dict[str, Any]:
    """Recall and false flags on the examples as they are and under each obfuscation."""
    flagged = {PLAIN: flags(guard, [example.guard_input() for example in examples], progress)}
    for number, (name, change) in enumerate(OBFUSCATIONS.items()):
        generator = np.random.default_rng([seed, number])
        items = [example.guard_input() for example in examples]
        changed = [replace(item, text=change(item.text, generator)) for item in items]
        flagged[name] = flags(guard, changed, progress)
    truth = np.array([bool(example.unsafe) for example in examples], bool)
    return changes(truth, flagged, [normal(example.prompt) for example in examples], seed=seed)


def judgements(examples: Sequence[Example]) -> int:
    """How many texts ``measure_robustness`` judges."""
    return len(examples) * (1 + len(OBFUSCATIONS))


def changes(
    truth: Booleans, flagged: dict[str, Booleans], clusters: Sequence[str], *, seed: int = 0
) -> dict[str, Any]:
    """Rates by name; of all but ``PLAIN`` also how far they are from its own, row by row."""

    def figures(weights: Floats) -> Figures:
        found: Figures = {}
        for name, predicted in flagged.items():
            rates = scores.rates(truth, predicted, weights)
            for figure in ("recall", "fpr"):
                found[name, figure] = rates[figure]
                if name != PLAIN:
                    found[name, f"{figure}_change"] = rates[figure] - found[PLAIN, figure]
        return found

    counts: Counts = {("n",): len(truth), ("unsafe",): int(truth.sum())}
    return measured(figures, clusters, counts, seed=seed)[0]
