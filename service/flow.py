"""What a choice says while it streams in, and where it is judged next. Pure.

A choice has tracks (its text, its reasoning, each of its tool calls), and one count of characters
over all of them, in the order of their coming: a *position*. A judgement up to a position looks at
the end of each track that grew, with an overlap over what was judged before, so that harm which is
split over two pieces is whole in one.

Pieces end where a sentence does, if one ended lately. They begin small, so that the first words
come soon, grow while the guard finds nothing, and are small again once it finds anything at all.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from models.inputs import GuardInput, Turn
from service import extractor
from service.exchange import Field, FieldName

WINDOW_CHARACTERS: Final = 900
"""About what fits a guard's window beside its context."""
OVERLAP_CHARACTERS: Final = 300
_FIRST_STEP: Final = 80.0
_SMALL_STEP: Final = 150.0
_LARGEST_STEP: Final = 700.0
_GROWTH: Final = 1.6
_RISK: Final = 0.12
"""A severity score from which pieces are small."""

_SENTENCE_END: Final = re.compile(r"""[.!?…]["'”’)\]*_]*(?=\s)|[。！？]["'”’」』）]*|\n""")
_TAIL: Final = 4


@dataclass(slots=True)
class _Track:
    """One running text: its parts, each with the position at which it came."""

    name: FieldName
    parts: list[tuple[int, str]] = field(default_factory=list)
    tail: str = ""
    """The last few characters."""

    def until(self, position: int, at_least: int) -> str:
        """The end of what had come before ``position``: the parts that hold so many characters."""
        texts: list[str] = []
        size = 0
        for start, text in reversed(self.parts):
            if start >= position:
                continue
            kept = text[: position - start]
            texts.append(kept)
            size += len(kept)
            if size >= at_least:
                break
        return "".join(reversed(texts))

    def since(self, position: int) -> int:
        """Characters that came from ``position`` on."""
        size = 0
        for start, text in reversed(self.parts):
            if start + len(text) <= position:
                break
            size += len(text) - max(position - start, 0)
        return size


class Flow:
    """One choice of one attempt. ``context`` is what it answers."""

    def __init__(self, context: tuple[Turn, ...]) -> None:
        self.position = 0
        """Characters that have come."""
        self._context = context
        self._tracks: dict[str, _Track] = {}
        self._offered = 0
        self._judged = 0
        self._boundary = 0
        self._step = _FIRST_STEP

    def add(self, name: FieldName, track: str, text: str) -> None:
        """More of a track has come."""
        running = self._tracks.get(track)
        if running is None:
            running = self._tracks[track] = _Track(name)
        before = running.tail
        both = before + text
        for mark in _SENTENCE_END.finditer(both):
            end = mark.end() - len(before)
            if end > 0:
                self._boundary = self.position + end
        running.tail = both[-_TAIL:]
        running.parts.append((self.position, text))
        self.position += len(text)

    def due(self, load: float = 1.0) -> int | None:
        """The position up to which it is worth judging now, if there is one; ``load`` above 1
        makes pieces larger.
        """
        step = self._step * load
        if self._boundary - self._offered >= step / 2:
            end = self._boundary
        elif self.position - self._offered >= step * 1.5:
            end = self.position
        else:
            return None
        self._offered = end
        return end

    def tail(self) -> int | None:
        """The position of its end, if that was not given by ``due``: nothing more comes for now."""
        if self.position <= self._offered:
            return None
        self._offered = self.position
        return self._offered

    def fields(self, end: int) -> tuple[Field, ...]:
        """What is to be judged to clear it up to ``end``."""
        return tuple(self._fields(end))

    def judged(self, end: int, severity_score: float) -> None:
        """It was judged up to ``end``; the score is the gravest of its fields."""
        self._judged = max(self._judged, end)
        if severity_score >= _RISK:
            self._step = _SMALL_STEP
        else:
            self._step = min(self._step * _GROWTH, _LARGEST_STEP)

    def _fields(self, end: int) -> Iterator[Field]:
        for path, track in self._tracks.items():
            new = track.since(self._judged) - track.since(end)
            if new <= 0:
                continue
            size = max(WINDOW_CHARACTERS, new + OVERLAP_CHARACTERS)
            text = track.until(end, size)[-size:]
            if track.name == "tool_call":
                text = extractor.unescaped(text)
            if text and not text.isspace():
                yield Field(track.name, path, GuardInput("response", text, self._context))
