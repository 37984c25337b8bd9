"""Long texts: harmless documents that a guard should pass, and the same with one harmful text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.random import Generator

from models.guard import Guard
from models.inputs import GuardInput
from models.sentences import sentence_ends
from training import scores
from training.bootstrap import Counts, Figures, measured
from training.judging import Progress, flags, unseen
from training.scores import Booleans, Floats

ALONE = "alone"


def document(texts: Sequence[str], length: int, generator: Generator) -> str:
    """Exactly ``length`` characters of the texts in random order, a paragraph each."""
    paragraphs: list[str] = []
    size = 0
    while size < length:
        for place in generator.permutation(len(texts)).tolist():
            paragraphs.append(texts[place])
            size += len(texts[place]) + 2
            if size >= length:
                break
    return "\n\n".join(paragraphs).ljust(length)[:length]


def with_inserted(text: str, harmful: str, generator: Generator) -> str:
    """``harmful`` as a paragraph of its own between two sentences, or at either end."""
    places = (0, *sentence_ends(text))
    place = places[int(generator.integers(len(places)))]
    return f"{text[:place]}\n\n{harmful}\n\n{text[place:]}".strip()


def measure_documents(
    guard: Guard,
    harmless: Sequence[str],
    harmful: Sequence[str],
    lengths: Sequence[int],
    number: int,
    progress: Progress = unseen,
    *,
    seed: int = 0,
) -> dict[str, Any]:
    """Shares flagged without (``flagged``) and with (``found``) a harmful text, by length.

    ``ALONE`` is over the same harmful texts by themselves.
    """
    generator = np.random.default_rng(seed)
    inserted = [harmful[int(generator.integers(len(harmful)))] for _ in range(number)]
    found = {ALONE: {"found": _flags(guard, inserted, progress)}}
    for length in lengths:
        texts = [document(harmless, length, generator) for _ in range(number)]
        pairs = zip(texts, inserted, strict=True)
        holding = [with_inserted(text, one, generator) for text, one in pairs]
        found[str(length)] = {
            "flagged": _flags(guard, texts, progress),
            "found": _flags(guard, holding, progress),
        }

    def figures(weights: Floats) -> Figures:
        total = weights.sum(axis=1)
        return {
            (length, name): scores.ratio(weights @ column, total)
            for length, columns in found.items()
            for name, column in columns.items()
        }

    counts: Counts = {(length, "n"): number for length in found}
    return measured(figures, [str(place) for place in range(number)], counts, seed=seed)[0]


def judgements(lengths: Sequence[int], number: int) -> int:
    """How many texts ``measure_documents`` judges."""
    return number * (1 + 2 * len(lengths))


def _flags(guard: Guard, texts: Sequence[str], progress: Progress) -> Booleans:
    # One at a time: a batch of long documents would hold all of their windows.
    verdicts = []
    for text in texts:
        verdicts.append(flags(guard, [GuardInput("prompt", text)], progress))
    return np.concatenate(verdicts)
