"""``sluicegate eval guard``: how well a guard agrees with labelled examples. Runs without torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from models.guard import Guard
from models.verdict import Verdict
from training import breakdown, documents, robustness, scores
from training.bootstrap import Figures, measured, nested
from training.columns import Positive, columns
from training.judging import Bars, Progress, judge_all, unseen
from training.labelled import Example
from training.latency import measure_latency
from training.scores import Floats
from training.streams import measure_streams
from training.suite import Group, Suite, sample

MEANS: Final[Mapping[Group, str]] = {
    "prompt": "f1",
    "response": "f1",
    "harmless": "fpr",
    "injection": "auprc",
}
"""The figure of which a group's sets give the mean."""

_TIMED = 200


def judge_examples(
    guard: Guard, examples: Sequence[Example], progress: Progress = unseen
) -> list[Verdict]:
    """Verdicts on all examples, in their order."""
    return judge_all(guard, [example.guard_input() for example in examples], progress)


def report(examples: Sequence[Example], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Figures over the rows that carry each label, at the calibrated operating point."""
    rows = columns(examples, verdicts)
    figures = breakdown.overall(rows, np.ones((1, len(examples))))
    result: dict[str, Any] = {"n": len(examples)}
    result |= {name: scores.number(value) for (name,), (value,) in figures.items()}
    rounded: dict[str, Any] = scores.rounded(result | {"language": _languages(examples)})
    return rounded


@dataclass(frozen=True, slots=True)
class Measured:
    """``report`` with its parts and the intervals of every figure, and what it was drawn from."""

    report: dict[str, Any]
    draws: Figures


def measure(
    examples: Sequence[Example],
    verdicts: Sequence[Verdict],
    positive: Positive = "unsafe",
    *,
    seed: int = 0,
) -> Measured:
    """The whole report of one set: a superset of ``report``'s keys, not rounded."""
    rows = columns(examples, verdicts, positive)

    def figures(weights: Floats) -> Figures:
        return breakdown.overall(rows, weights) | breakdown.parts(rows, weights)

    counts = breakdown.counts(rows) | {("language",): _languages(examples)}
    found, draws = measured(figures, rows.clusters, counts, seed=seed)
    # Single numbers stand before the tables.
    found = dict(sorted(found.items(), key=lambda item: isinstance(item[1], dict | list)))
    return Measured({"n": len(examples), "positive": positive} | found, draws)


def evaluate(
    guard: Guard, suite: Suite, bars: Bars, *, threads: int | None = None
) -> dict[str, Any]:
    """All that ``suite`` asks for, rounded; ``threads`` of the guard, where latency is wanted."""
    sets: dict[str, Measured] = {}
    for number, one in enumerate(suite.sets):
        progress = bars(one.name, len(one.examples))
        verdicts = judge_examples(guard, one.examples, progress)
        seed = suite.seed + number
        sets[one.name] = measure(one.examples, verdicts, one.positive, seed=seed)
    result: dict[str, Any] = {"guard": guard.id, "suite": suite.name}
    result |= {"sets": {name: one.report for name, one in sets.items()}}
    result |= {"means": means(suite, sets)}
    if suite.prompts:
        progress = bars("robustness", robustness.judgements(suite.prompts))
        found = robustness.measure_robustness(guard, suite.prompts, progress, seed=suite.seed)
        result["robustness"] = found
    if suite.long_texts:
        texts = suite.long_texts
        result["long_texts"] = documents.measure_documents(
            guard,
            texts.harmless,
            texts.harmful,
            texts.lengths,
            texts.documents,
            bars("long texts", documents.judgements(texts.lengths, texts.documents)),
            seed=suite.seed,
        )
    if suite.streams:
        progress = bars("streams", sum(len(one.ends) for one in suite.streams))
        result["streams"] = measure_streams(guard, suite.streams, progress, seed=suite.seed)
    if threads is not None:
        everything = [example for one in suite.sets for example in one.examples]
        items = [row.guard_input() for row in sample(everything, _TIMED, suite.seed)]
        result["latency"] = measure_latency(guard, items, threads, seed=suite.seed)
    rounded: dict[str, Any] = scores.rounded(result)
    return rounded


def means(suite: Suite, sets: Mapping[str, Measured]) -> dict[str, Any]:
    """The mean of each group's sets, those left out in which the figure is undefined."""
    point: Figures = {}
    draws: Figures = {}
    for group, figure in MEANS.items():
        members = [sets[one.name] for one in suite.sets if one.group == group]
        members = [one for one in members if one.report[figure] is not None]
        if members:
            path = (f"{group}_{figure}",)
            point[path] = np.array([np.mean([one.report[figure] for one in members])])
            draws[path] = np.mean([one.draws[(figure,)] for one in members], axis=0)
    return nested(point, draws, {})


def _languages(examples: Sequence[Example]) -> dict[str, int]:
    return dict(Counter(example.lang for example in examples).most_common())
