"""``sluicegate eval guard``: how well a guard agrees with labelled examples. Runs without torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from models.guard import Guard, judge
from models.taxonomy import CATEGORIES, SIGNALS, Severity
from models.verdict import Verdict
from training import scores
from training.labelled import Example

_CHUNK = 256
_REFUSAL = SIGNALS.index("refusal")


def judge_examples(
    guard: Guard, examples: Sequence[Example], progress: Callable[[int], None] = lambda _: None
) -> list[Verdict]:
    """Verdicts on all examples; ``progress`` is told how many more are done."""
    verdicts: list[Verdict] = []
    for start in range(0, len(examples), _CHUNK):
        chunk = examples[start : start + _CHUNK]
        verdicts += judge(guard, [example.guard_input() for example in chunk])
        progress(len(chunk))
    return verdicts


def report(examples: Sequence[Example], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Figures over the rows that carry each label, at the calibrated operating point.

    Category figures are over rows labelled unsafe that have ``pku_categories``; ``refusal_f1`` is
    over responses with that label.
    """
    pairs = list(zip(examples, verdicts, strict=True))
    result: dict[str, Any] = {"n": len(pairs)}

    labelled = [(e, v) for e, v in pairs if e.unsafe is not None]
    truth = np.array([e.unsafe for e, _ in labelled], bool)
    probability = np.array([v.unsafe_probability for _, v in labelled], float)
    flagged = np.array([v.level > Severity.NONE for _, v in labelled], bool)
    result |= scores.binary(truth, probability, flagged)

    graded = [(e.severity, v.level) for e, v in pairs if e.severity is not None]
    result |= scores.severity(
        np.array([truth for truth, _ in graded], np.int64),
        np.array([level for _, level in graded], np.int64),
    )

    sorted_out = [(e.pku_categories, v) for e, v in pairs if e.pku_categories]
    true_categories = np.array(
        [[name in names for name in CATEGORIES] for names, _ in sorted_out], bool
    ).reshape(-1, len(CATEGORIES))
    found_categories = np.array(
        [[name in v.categories for name in CATEGORIES] for _, v in sorted_out], bool
    ).reshape(-1, len(CATEGORIES))
    result |= scores.multilabel(true_categories, found_categories)

    refusals = [
        (e.refusal, v.signal_scores[_REFUSAL] >= 0.5)
        for e, v in pairs
        if e.refusal is not None and e.role == "response"
    ]
    result["refusal_f1"] = scores.f1(
        np.array([truth for truth, _ in refusals], bool), np.array([p for _, p in refusals], bool)
    )
    result["language"] = dict(Counter(example.lang for example in examples).most_common())
    return scores.rounded(result)
