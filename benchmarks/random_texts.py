"""Random texts whose every piece tells where it belongs, and how far a guard has cleared them.

Each text is written with a symbol of its own and with numbered words: a piece of it is known
wherever it turns up, and once only.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final

from service.extractor import leaves, unescaped

SEVERE, MINOR = "gravemarker", "mildmarker"
SYMBOLS: Final = range(0x4E00, 0xA000)
OF_ONE_SYMBOL: Final = re.compile(r"([\u4e00-\u9fff])(?:[^\u4e00-\u9fff]|\1)*")

_NUMBERS: Final = tuple(f"{number:03d}" for number in range(1000))
_GAPS: Final = (" ", " ", " ", " ", " ", ", ", ". ", "? ", "! ", "\n", "… ", " \U0001f600 ", "。")
_JOINED_WORDS: Final = 55
_HALF_ESCAPE: Final = re.compile(r"\\(?:u[0-9a-fA-F]{0,3})?$")


def flat(text: str) -> str:
    """``text`` without blanks."""
    return "".join(text.split())


@dataclass(slots=True)
class Text:
    """A text of one attempt that comes in pieces. ``flat`` is what a guard reads of it, without
    blanks; it is known by its ``symbol``, or by its ``name`` where it is a tool's call.
    """

    symbol: str
    raw: str
    flat: str
    name: str = ""
    cleared: int = 0
    """So much of ``flat`` was cleared."""
    later: list[tuple[int, int]] = field(default_factory=list)
    """What was cleared, from where to where."""
    read: dict[str, int] = field(default_factory=dict)
    """Where escapes hide what is read: what a guard reads of each beginning, and its size."""

    def clear(self, text: str) -> None:
        """A guard has cleared ``text``, which is flat."""
        if self.cleared == len(self.flat):
            return
        if self.flat in text or (self.name and self._is_told_by(text)):
            self.cleared = len(self.flat)
            return
        if text in self.read:
            self.later.append((0, self.read[text]))
        elif (start := self.flat.find(text)) >= 0:
            self.later.append((start, start + len(text)))
        for start, end in sorted(self.later):
            if start <= self.cleared < end:
                self.cleared = end

    def _is_told_by(self, text: str) -> bool:
        """Whether ``text`` tells all of a tool's arguments as what they mean."""
        with suppress(ValueError):
            told = [self.name, *leaves(json.loads(self.raw)).split("\n")]
            return all(flat(one) in text for one in told)
        return False

    def size(self, got: str) -> int:
        """The flat size of a beginning."""
        return len(flat(self.name)) + len(flat(unescaped(_HALF_ESCAPE.sub("", got))))


class Author:
    """Writes the texts of one attempt; ``texts`` holds those that come in pieces."""

    def __init__(self, draw: random.Random, symbols: Iterator[int]) -> None:
        self._draw = draw
        self._symbols = symbols
        self._is_marked = draw.random() < 0.35
        self._is_long = draw.random() < 0.15
        self._most = draw.choice((4, 12, 30, 200) if self._is_long else (8, 30, 80, 300))
        self._odds = draw.choice((0.01, 0.01, 0.2))
        self.texts: list[Text] = []

    def text(self) -> list[str]:
        """A running text, in pieces."""
        sizes = (1, 30, 60, 160, 220) if self._is_long else (1, 3, 12, 30, 30, 40, 60)
        raw, symbol = self._prose(self._draw.choice(sizes))
        self.texts.append(Text(symbol, raw, flat(raw)))
        return self._pieces(raw)

    def call(self) -> tuple[str, list[str]]:
        """A tool's call: its name, and its arguments in pieces."""
        words = self._draw.choice((2, 8, 25))
        prose, symbol = self._prose(words)
        name = f"call_{ord(symbol)}"
        is_ascii = words < 10 and self._draw.random() < 0.3
        raw = json.dumps({"a": prose, "b": [words]}, ensure_ascii=is_ascii)
        if self._draw.random() < 0.3:
            for word in (SEVERE, MINOR):
                raw = raw.replace(word, f"\\u{ord(word[0]):04x}{word[1:]}")
        text = Text(symbol, raw, flat(name + unescaped(raw)), name)
        if "\\" in raw:
            for end in range(1, len(raw) + 1):
                beginning = raw[:end]
                text.read[flat(name + unescaped(beginning))] = text.size(beginning)
        self.texts.append(text)
        return name, self._pieces(raw)

    def note(self) -> str:
        """A text under a key that nobody knows."""
        return self._prose(self._draw.randint(1, 8), marks=0.05)[0]

    def extra(self) -> dict[str, Any]:
        """Keys that nobody knows, now and then; in some streams often."""
        if self._draw.random() >= self._odds:
            return {}
        note = self.note()
        value = self._draw.choice((note, {"a": [note]}))
        return {self._draw.choice(("note", "extra")): value}

    def _prose(self, words: int, marks: float = 0.4) -> tuple[str, str]:
        """A text that is told apart from every other, wherever a piece of it is; its symbol."""
        draw, symbol = self._draw, chr(next(self._symbols))
        parts = [symbol + number for number in _NUMBERS[:words]]
        if self._is_marked and draw.random() < marks:
            parts[draw.randrange(words)] += " " + draw.choice((SEVERE, SEVERE, MINOR))
        gaps = draw.choices(_GAPS, k=words)
        if self._is_long and draw.random() < 0.3:
            # One word of more than two hundred characters.
            start = draw.randrange(words)
            end = min(start + _JOINED_WORDS, words)
            gaps[start:end] = [""] * (end - start)
        return "".join([one for pair in zip(parts, gaps, strict=True) for one in pair]), symbol

    def _pieces(self, text: str) -> list[str]:
        out, start = [], 0
        while start < len(text):
            end = start + self._draw.randint(1, self._most)
            out.append(text[start:end])
            start = end
        return out
