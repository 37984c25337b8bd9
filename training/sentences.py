"""Where sentences end: the places at which a stream's text is judged."""

from __future__ import annotations

import re
from typing import Final

_END: Final = re.compile(r"(?:[.!?…]+[\"'”’)\]*_]*(?=\s|$)|[。！？]+[」』”’）]*|\n)\s*")
_NOT_AN_END: Final = re.compile(
    r"(?:^|[\s(])(?:[A-Za-z]|\d{1,3}|mr|mrs|ms|dr|prof|st|vs|etc|e\.g|i\.e|no|fig|approx)\.\s*$",
    re.IGNORECASE,
)


def sentence_ends(text: str) -> tuple[int, ...]:
    """Character offsets just after each sentence; the last is the length of ``text``.

    A line break ends a sentence; the number of a list item and a common abbreviation do not.
    """
    ends: list[int] = []
    start = 0
    for match in _END.finditer(text):
        piece = text[start : match.end()]
        if not piece.strip() or ("\n" not in match.group() and _NOT_AN_END.search(piece)):
            continue
        ends.append(match.end())
        start = match.end()
    if text and (not ends or ends[-1] < len(text)):
        ends.append(len(text))
    return tuple(ends)
