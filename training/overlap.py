"""Texts that repeat each other, found by shared word 5-grams.

One index serves two questions: is a row a near copy of one that the mix has, and does it repeat a
text that is kept back for evaluation. A file of kept-back hashes has one line a text: first the
hash of the whole, then of each 5-gram (``fingerprint``), so that a text can be recognised and not
read.
"""

from __future__ import annotations

import gzip
import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from training.labelled import LabelError

GRAM_WORDS: Final = 5
_HASH_DIGITS: Final = 10
_SPEAKERS: Final = re.compile(r"\b(?:human|user|assistant|ai):", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """Hashes of a text's words: of the whole, and of each run of ``GRAM_WORDS`` of them."""

    whole: int
    grams: frozenset[int]


@dataclass(frozen=True, slots=True)
class Match:
    """The indexed text that shares most with another one."""

    number: int
    """In order of ``OverlapIndex.add``."""
    of_text: float
    """Share of the text's 5-grams that the indexed one holds; 1 where the whole is equal."""
    of_indexed: float
    """Share of the indexed one's 5-grams that the text holds."""


def fingerprint(text: str) -> Fingerprint:
    """Lower case, without speakers' marks, punctuation and layout."""
    words = re.findall(r"\w+", _SPEAKERS.sub(" ", text).lower())
    runs = range(len(words) - GRAM_WORDS + 1)
    return Fingerprint(
        _hash(" ".join(words)),
        frozenset(_hash(" ".join(words[start : start + GRAM_WORDS])) for start in runs),
    )


class OverlapIndex:
    """Finds the indexed texts that a new one repeats.

    A 5-gram counts for the first ``most_holders`` texts that hold it: all, if None.
    """

    def __init__(self, most_holders: int | None = None) -> None:
        self._most_holders = most_holders
        self._whole: dict[int, int] = {}
        self._sizes: list[int] = []
        self._holders: dict[int, list[int]] = {}

    def add(self, item: Fingerprint) -> int:
        """Indexes a text; its number."""
        number = len(self._sizes)
        self._sizes.append(len(item.grams))
        self._whole.setdefault(item.whole, number)
        for gram in item.grams:
            holders = self._holders.setdefault(gram, [])
            if self._most_holders is None or len(holders) < self._most_holders:
                holders.append(number)
        return number

    def matches(self, item: Fingerprint) -> list[Match]:
        """All indexed texts that share a 5-gram or the whole with ``item``, nearest first."""
        shared: Counter[int] = Counter()
        for gram in item.grams:
            shared.update(self._holders.get(gram, ()))
        found = [
            Match(number, count / len(item.grams), count / self._sizes[number])
            for number, count in shared.items()
        ]
        equal = self._whole.get(item.whole)
        if equal is not None:
            found = [match for match in found if match.number != equal]
            found.append(Match(equal, 1.0, 1.0))
        return sorted(found, key=lambda match: -match.of_text)

    def repeats(self, item: Fingerprint) -> bool:
        """Whether ``item`` is an indexed text, is mostly made of one, or holds nearly all of it."""
        return any(match.of_text >= 0.7 or match.of_indexed >= 0.9 for match in self.matches(item))


def read_hashes(path: Path) -> Sequence[Fingerprint]:
    """The texts of a gzip file of hashes; ``LabelError`` where it is not one."""
    try:
        with gzip.open(path, "rt", encoding="ascii") as file:
            numbers = [[int(word, 16) for word in line.split()] for line in file]
    except (OSError, EOFError, ValueError) as error:
        raise LabelError(f"{path} is not a gzip file of hashes: {error}") from error
    return [Fingerprint(line[0], frozenset(line[1:])) for line in numbers if line]


def _hash(text: str) -> int:
    # Not for secrecy: the file of kept-back texts fixes the function.
    digest = hashlib.sha1(text.encode("utf-8", "surrogatepass"), usedforsecurity=False)
    return int(digest.hexdigest()[:_HASH_DIGITS], 16)
