"""Stand-in guards that judge by marker words, through the real inputs, windows and batches.

Words that they know: ``LEVEL-CATEGORY`` such as ``severe-violence``, ``signal-NAME`` such as
``signal-self_harm``, ``poison``, ``rotten``, and those of ``word_tokenizer``. Any other word is
read, but is no symbol of theirs, as its coverage says.
"""

import threading
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Final

import numpy as np
from tokenizers import AddedToken, Tokenizer

from models.calibration import Calibration
from models.guard import (
    CATEGORY_COLUMNS,
    COLUMNS,
    SEVERITY_COLUMNS,
    SIGNAL_COLUMNS,
    Logits,
)
from models.inputs import GuardInput, InputEncoder, Window, Windows
from models.taxonomy import CATEGORIES, SIGNALS, Severity
from models.verdict import Verdict
from tests.models.tokenizers import word_tokenizer

CANARY: Final = "canaryquokka"
"""Stands for what a client says: it must be in no error, log line or metric."""

_YES, _NO = 5.0, -5.0
_PATIENCE: Final = 20.0
"""Seconds after which a test that would hang fails."""


@cache
def marker_tokenizer() -> Tokenizer:
    """``word_tokenizer`` with the markers, each a token of its own."""
    tokenizer = Tokenizer.from_str(word_tokenizer().to_str())
    words = [*_columns(), "poison", "rotten", CANARY]
    tokenizer.add_tokens([AddedToken(word, single_word=True) for word in words])
    return tokenizer


@cache
def _columns() -> Mapping[str, list[int]]:
    """The columns that each marker raises."""
    columns = {
        f"{level.label}-{name}": [*range(level), CATEGORY_COLUMNS.start + number]
        for level in Severity
        if level
        for number, name in enumerate(CATEGORIES)
    }
    signals = {f"signal-{name}": [SIGNAL_COLUMNS.start + n] for n, name in enumerate(SIGNALS)}
    return columns | signals


class WordGuard:
    """``severe-violence`` in a target makes it severe, in that category; other texts are safe.

    ``batches`` holds the windows of each batch that was asked for.
    """

    id = "words-1"

    def __init__(self) -> None:
        tokenizer = Tokenizer.from_str(marker_tokenizer().to_str())
        self._encoder = InputEncoder(tokenizer)
        vocabulary = tokenizer.get_vocab()
        self._words = {number: word for word, number in vocabulary.items()}
        self._markers = {vocabulary[word]: columns for word, columns in _columns().items()}
        self.batches: list[tuple[Window, ...]] = []

    def prepare(self, item: GuardInput) -> Windows:
        return self._encoder.encode(item)

    def score(self, windows: Sequence[Window]) -> Logits:
        self.batches.append(tuple(windows))
        logits = np.full((len(windows), COLUMNS), _NO, np.float32)
        for row, window in enumerate(windows):
            for marker in self._markers.keys() & window.token_ids[window.context_length :]:
                logits[row, self._markers[marker]] = _YES
        return logits

    def conclude(self, item: GuardInput, prepared: Windows, logits: Logits) -> Verdict:
        if not np.all(np.isfinite(logits)):
            raise ValueError("the guard's output is not finite")
        pooled = logits.max(axis=0, keepdims=True)
        (row,) = Calibration.identity().probabilities(pooled).tolist()
        minor, moderate, severe = row[SEVERITY_COLUMNS]
        return Verdict(
            item.role,
            (minor, moderate, severe),
            tuple(row[CATEGORY_COLUMNS]),
            tuple(row[SIGNAL_COLUMNS]),
            prepared.coverage,
        )

    def words(self, window: Window) -> list[str]:
        """What a window holds beside its context and its special tokens."""
        words = [self._words[number] for number in window.token_ids[window.context_length :]]
        return [word for word in words if not word.startswith("[")]


class BrokenGuard(WordGuard):
    """Fails on a batch that holds ``poison``; gives NaN for a text that holds ``rotten``.

    Its exception says what it was reading, as a library's may.
    """

    def score(self, windows: Sequence[Window]) -> Logits:
        logits = super().score(windows)
        for row, window in enumerate(windows):
            words = self.words(window)
            if "poison" in words:
                raise RuntimeError(f"cannot score {' '.join(words)}")
            if "rotten" in words:
                logits[row] = np.nan
        return logits


class SlowGuard(WordGuard):
    """Scores nothing until it is let go: ``entered`` tells that a batch has begun."""

    def __init__(self) -> None:
        super().__init__()
        self.entered = threading.Semaphore(0)
        self._go = threading.Semaphore(0)
        self._is_free = threading.Event()

    def score(self, windows: Sequence[Window]) -> Logits:
        logits = super().score(windows)
        self.entered.release()
        if not self._is_free.is_set() and not self._go.acquire(timeout=_PATIENCE):
            raise TimeoutError("no test let the guard go")
        return logits

    def wait_until_entered(self) -> None:
        """Blocks until another batch has begun; fails after a while."""
        if not self.entered.acquire(timeout=_PATIENCE):
            raise TimeoutError("no batch reached the guard")

    def step(self) -> None:
        """Lets one batch go."""
        self._go.release()

    def let_go(self) -> None:
        """Lets this and all further batches go."""
        self._is_free.set()
        self._go.release()
