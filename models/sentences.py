"""Where sentences end: the places at which a stream of text is judged."""

from __future__ import annotations

import re
from typing import Final

# Marks that end a sentence, with the quotes and brackets that close with it. Chinese and Japanese
# marks need no blank after them.
_END: Final = re.compile(r"""[.!?…]+["'”’)\]*_]*(?=\s)|[。！？]+["'”’」』）]*|\n""")
_ABBREVIATIONS: Final = frozenset(
    [
        *("approx", "cf", "co", "dr", "e.g", "etc", "fig", "gen", "i.e", "inc", "jr", "ltd"),
        *("mr", "mrs", "ms", "prof", "rev", "sr", "st", "vs"),
    ]
)
# A sentence that so far is a number or a letter, as at the start of a list's line.
_LIST_MARK: Final = re.compile(r"(?:\d{1,3}|[A-Za-z])$")
_LOOK_BACK: Final = 40


def sentence_ends(text: str) -> tuple[int, ...]:
    """Offsets after each sentence, rising; the last is ``len(text)``. Empty for an empty text.

    A sentence takes the blanks after it, so that the pieces between the offsets are the text. A
    new line ends one too. Common abbreviations, initials and the numbers of a list do not.
    """
    if not text:
        return ()
    ends: list[int] = []
    # Blanks at the beginning belong to the first sentence.
    start = len(text) - len(text.lstrip())
    for mark in _END.finditer(text, start):
        if mark.end() <= start or (mark.group()[0] == "." and _is_inside(text, start, mark)):
            continue
        start = mark.end()
        while start < len(text) and text[start].isspace():
            start += 1
        ends.append(start)
    return tuple(ends) if ends and start == len(text) else (*ends, len(text))


def _is_inside(text: str, start: int, mark: re.Match[str]) -> bool:
    """Whether this full stop belongs to a word or to a list's number."""
    before = text[max(start, mark.start() - _LOOK_BACK) : mark.start()]
    word = before.rsplit(maxsplit=1)[-1].lstrip("([\"'“‘").lower() if before.strip() else ""
    is_initial = len(word) == 1 and word.isalpha() and word != "i"
    return is_initial or word in _ABBREVIATIONS or _LIST_MARK.match(before) is not None
