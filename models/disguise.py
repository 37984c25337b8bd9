"""Texts whose words are hidden from a filter, and what they say. Pure.

People write around filters with look-alike letters, invisible characters, blanks between letters,
digits for letters, or base64. A guard reads such a text twice: as it stands, and revealed.
"""

from __future__ import annotations

import base64
import binascii
import re
import unicodedata
from typing import Final

_LATIN: Final = re.compile(r"[A-Za-z]")
# Cyrillic and Greek letters that look like Latin ones (Unicode Technical Standard 39).
_LOOKALIKES: Final = str.maketrans(
    "асеорхуіјѕһԁԛԝАВЕКМНОРСТУХІЈЅαοριυνκτΑΒΕΖΗΙΚΜΝΟΡΤΥΧ",
    "aceopxyijshdqwABEKMHOPCTYXIJSaopiuvktABEZHIKMNOPTYX",
)
_FOREIGN: Final = re.compile("[\u0370-\u03ff\u0400-\u04ff\u0500-\u052f]")
_WORD: Final = re.compile(r"\w+")

# One letter, one mark, one letter ...: at least four letters with the same mark between.
_SPACED: Final = re.compile(r"(?<!\w)[^\W_]([ .\-_*])(?:[^\W_]\1){2,}[^\W_](?!\w)")

_DIGITS: Final = str.maketrans("431057809@$!", "aeiostbogasi")
# Short runs alone: a longer one is a hash, a key or an address.
_RUN: Final = re.compile(r"[A-Za-z0-9@$!]{2,20}[.,;:?)]*")
_ORDINARY: Final = re.compile(
    r"(?i)\d+(?:st|nd|rd|th|s|x|k|m|g|mb|gb|kg|km|mm|cm|am|pm|d|h|p)|[a-z]+\d+|[0-9a-f]{6,}"
)
_LEAST_SHARE: Final = 0.2
"""Of words with digits for letters: fewer are names and models."""

_BASE64: Final = re.compile(r"(?<![A-Za-z0-9+/_-])[A-Za-z0-9+/_-]{16,}={0,2}(?![A-Za-z0-9+/=])")
_LEAST_READABLE: Final = 0.95


def revealed(text: str) -> str | None:
    """What ``text`` says once its words are no longer hidden; None where none are."""
    result = _decoded(_joined(_in_one_script(_visible(text))))
    result = _with_letters(result)
    return None if result == text else result


def _visible(text: str) -> str:
    """Without characters of Unicode's category Cf, as zero-width ones are."""
    if text.isascii():
        return text
    return "".join(c for c in text if unicodedata.category(c) != "Cf" or c in "\u200d\ufe0f")


def _in_one_script(text: str) -> str:
    """Full-width and styled letters as plain ones; words of two scripts in Latin."""
    if text.isascii():
        return text

    def one(match: re.Match[str]) -> str:
        word = match.group()
        if word.isascii():
            return word
        plain = unicodedata.normalize("NFKC", word)
        is_mixed = _FOREIGN.search(plain) and _LATIN.search(plain)
        return plain.translate(_LOOKALIKES) if is_mixed else plain

    return _WORD.sub(one, text)


def _joined(text: str) -> str:
    return _SPACED.sub(lambda match: match.group().replace(match.group(1), ""), text)


def _with_letters(text: str) -> str:
    """Letters for digits, where many words mix the two."""
    words = text.split()
    mixed = sum(_mixes(word) for word in words)
    if mixed < 2 or mixed < _LEAST_SHARE * len(words):
        return text
    return text.translate(_DIGITS)


def _mixes(word: str) -> bool:
    """Whether ``word`` has digits among its letters, other than names and measures have."""
    if not _RUN.fullmatch(word):
        return False
    bare = word.rstrip(".,;:?)!")
    has_both = any(c.isalpha() for c in bare) and not bare.isalpha()
    return has_both and not _ORDINARY.fullmatch(bare)


def _decoded(text: str) -> str:
    def one(match: re.Match[str]) -> str:
        run = match.group()
        # Lower case alone is a long word or a path.
        if run.islower() or run.isupper() or (run.isalpha() and run.istitle()):
            return run
        padded = run.rstrip("=").translate(_URL_SAFE)
        padded += "=" * (-len(padded) % 4)
        try:
            found = base64.b64decode(padded, validate=True).decode("utf-8")
        except (binascii.Error, UnicodeDecodeError):
            return run
        readable = sum(c.isprintable() or c.isspace() for c in found)
        return found if readable >= _LEAST_READABLE * len(found) else run

    return _BASE64.sub(one, text)


_URL_SAFE: Final = str.maketrans("-_", "+/")
