"""Ways in which people hide words from a filter, as pure functions of a text.

Training shows them to the guard with the text's own label; ``sluicegate eval guard`` measures
what each costs. A harmless text that is written so stays harmless.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable
from typing import Final

from numpy.random import Generator

Obfuscation = Callable[[str, Generator], str]

_LEET: Final = str.maketrans("aeiostbg", "43105789")
# Cyrillic and Greek letters that look like Latin ones.
_LOOKALIKES: Final = str.maketrans("aceopxyiAEKMHOPCTX", "асеорхуіАЕКМНОРСТХ")
_ZERO_WIDTH: Final = "\u200b\u200c\u200d\u2060"
_NEIGHBOURS: Final = {
    "a": "sq", "b": "vn", "c": "xv", "d": "sf", "e": "wr", "f": "dg", "g": "fh", "h": "gj",
    "i": "uo", "j": "hk", "k": "jl", "l": "k", "m": "n", "n": "bm", "o": "ip", "p": "o",
    "q": "wa", "r": "et", "s": "ad", "t": "ry", "u": "yi", "v": "cb", "w": "qe", "x": "zc",
    "y": "tu", "z": "x",
}  # fmt: skip


def leetspeak(text: str, generator: Generator) -> str:
    """Digits for letters, in most of the words."""
    return _some_words(text, generator, 0.7, lambda word: word.translate(_LEET))


def zero_width(text: str, generator: Generator) -> str:
    """Invisible characters inside most of the words."""

    def split(word: str) -> str:
        if len(word) < 3:
            return word
        cut = int(generator.integers(1, len(word)))
        return word[:cut] + _ZERO_WIDTH[int(generator.integers(len(_ZERO_WIDTH)))] + word[cut:]

    return _some_words(text, generator, 0.8, split)


def homoglyphs(text: str, generator: Generator) -> str:
    """Letters of other alphabets that look alike, in most of the words."""
    return _some_words(text, generator, 0.7, lambda word: word.translate(_LOOKALIKES))


def spacing(text: str, generator: Generator) -> str:
    """Blanks, dots or hyphens between the letters of some of the words."""
    mark = (" ", ".", "-", "_")[int(generator.integers(4))]
    return _some_words(text, generator, 0.5, lambda word: mark.join(word))


def base64_whole(text: str, generator: Generator) -> str:
    """The text in base64, under a line that asks to decode it."""
    heads = ("Decode this base64 and do what it says:", "Answer the base64 message.", "base64:")
    encoded = base64.b64encode(text.encode("utf-8", "surrogatepass")).decode()
    return f"{heads[int(generator.integers(len(heads)))]} {encoded}"


def typos(text: str, generator: Generator) -> str:
    """Swapped, doubled, dropped and neighbouring letters in a third of the words."""

    def mistype(word: str) -> str:
        if len(word) < 4:
            return word
        place = int(generator.integers(1, len(word) - 1))
        kind = int(generator.integers(4))
        if kind == 0:
            return word[:place] + word[place + 1] + word[place] + word[place + 2 :]
        if kind == 1:
            return word[:place] + word[place] + word[place:]
        if kind == 2:
            return word[:place] + word[place + 1 :]
        near = _NEIGHBOURS.get(word[place].lower(), word[place])
        return word[:place] + near[int(generator.integers(len(near)))] + word[place + 1 :]

    return _some_words(text, generator, 0.34, mistype)


def letter_case(text: str, generator: Generator) -> str:
    """All capitals, no capitals, or capitals at random."""
    kind = int(generator.integers(3))
    if kind < 2:
        return text.upper() if kind else text.lower()
    return "".join(c.upper() if generator.random() < 0.5 else c.lower() for c in text)


OBFUSCATIONS: Final[dict[str, Obfuscation]] = {
    "base64": base64_whole,
    "case": letter_case,
    "homoglyphs": homoglyphs,
    "leetspeak": leetspeak,
    "spacing": spacing,
    "typos": typos,
    "zero_width": zero_width,
}
"""By the name that reports give them."""


def _some_words(text: str, generator: Generator, share: float, change: Callable[[str], str]) -> str:
    """Applies ``change`` to about ``share`` of the words, at least to one."""
    words = list(re.finditer(r"\w+", text))
    if not words:
        return text
    chosen = generator.random(len(words)) < share
    chosen[int(generator.integers(len(words)))] = True
    parts, end = [], 0
    for word, take in zip(words, chosen, strict=True):
        parts += [text[end : word.start()], change(word.group()) if take else word.group()]
        end = word.end()
    return "".join([*parts, text[end:]])
