"""Conversations that a dataset wrote into one prompt, taken apart into turns."""

from __future__ import annotations

import re
from typing import Final

from models.inputs import Speaker
from training.labelled import PastTurn

_NAME: Final = "(Human|HUMAN|User|USER|Assistant|ASSISTANT|AI)"
# "Human:" and "### Human:" before a turn, or "### Human" on a line of its own.
_MARK: Final = re.compile(rf"^[ \t]*(?:(?:### ?)?{_NAME}:|### ?{_NAME}[ \t]*$)", re.MULTILINE)


def parse(text: str) -> tuple[tuple[PastTurn, ...], str]:
    """The turns before the last of the user, oldest first, and that last one.

    A mark such as ``Human:`` counts at the start of a line, and only in a text that starts with
    one. Blanks around a turn are dropped, and so is an ``Assistant:`` at the end that waits for
    its answer. Any other text, and one that ends with an answer, is returned as it is.
    """
    marks = list(_MARK.finditer(text))
    if not marks or text[: marks[0].start()].strip():
        return (), text
    ends = [*(mark.start() for mark in marks[1:]), len(text)]
    turns = [
        PastTurn(speaker=_speaker(mark), text=text[mark.end() : end].strip())
        for mark, end in zip(marks, ends, strict=True)
    ]
    if turns[-1] == PastTurn(speaker="assistant", text=""):
        turns.pop()
    if not turns or turns[-1].speaker != "user" or not turns[-1].text:
        return (), text
    return tuple(turns[:-1]), turns[-1].text


def _speaker(mark: re.Match[str]) -> Speaker:
    return "user" if (mark[1] or mark[2]).lower() in ("human", "user") else "assistant"
