"""Intervals of figures by the bootstrap: how far they would move with other rows of the same kind.

Figures carry a path, such as ``("by_source", "catqa", "recall")``, so that one resampling serves
every table of a report.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np

from training.scores import Floats, number

Path = tuple[str, ...]
Figures = dict[Path, Floats]
"""Arrays of shape (draws,), by path."""
Counts = Mapping[Path, Any]
"""Numbers that have no interval, by path."""
Measure = Callable[[Floats], Figures]
"""Figures of weights of shape (draws, rows): how often each row counts."""

DRAWS: Final = 1000
_CELLS: Final = 500_000
"""Weights held at once: draws times rows. It bounds the memory that a large file takes."""
_BOUNDS: Final = (2.5, 97.5)


def resampled(
    measure: Measure, clusters: Sequence[str], *, draws: int = DRAWS, seed: int = 0
) -> Figures:
    """Figures on resamples of the rows with replacement.

    ``clusters`` names each row's cluster. Rows of one cluster are drawn together, since they are
    not independent: the answers to one prompt.
    """
    if not clusters:
        return measure(np.ones((1, 0)))
    names = {name: number for number, name in enumerate(dict.fromkeys(clusters))}
    cluster_of = np.array([names[name] for name in clusters])
    generator = np.random.default_rng(seed)
    block = max(1, min(draws, _CELLS // len(clusters)))
    blocks: list[Figures] = []
    for start in range(0, draws, block):
        size = (min(block, draws - start), len(names))
        chosen = generator.integers(len(names), size=size)
        times = np.zeros(size)
        np.add.at(times, (np.arange(size[0])[:, None], chosen), 1.0)
        blocks.append(measure(times[:, cluster_of]))
    return {path: np.concatenate([one[path] for one in blocks]) for path in blocks[0]}


def interval(values: Floats) -> tuple[float, float] | None:
    """The middle 95% of the draws in which a figure is defined; None where it is in none."""
    defined = values[~np.isnan(values)]
    if not len(defined):
        return None
    low, high = np.percentile(defined, _BOUNDS)
    return float(low), float(high)


def nested(point: Figures, draws: Figures, counts: Counts) -> dict[str, Any]:
    """Figures as JSON: ``{"f1": …, "intervals": {"f1": [low, high]}}`` at each path.

    ``counts`` stand first, and have no interval. What is undefined is None.
    """
    result: dict[str, Any] = {}

    def place(path: Path) -> dict[str, Any]:
        node = result
        for name in path[:-1]:
            node = node.setdefault(name, {})
        return node

    for path, count in counts.items():
        place(path)[path[-1]] = count
    for path, (value,) in point.items():
        place(path)[path[-1]] = number(value)
    for path, (value,) in point.items():
        bounds = None if np.isnan(value) else interval(draws[path])
        place(path).setdefault("intervals", {})[path[-1]] = bounds
    return result


def measured(
    measure: Measure,
    clusters: Sequence[str],
    counts: Counts,
    *,
    seed: int = 0,
) -> tuple[dict[str, Any], Figures]:
    """The figures with their intervals as JSON, and their draws."""
    draws = resampled(measure, clusters, seed=seed)
    return nested(measure(np.ones((1, len(clusters)))), draws, counts), draws
