"""Replaces what points at a person or opens a door by placeholders, for texts that are kept.

A small list of patterns, no promise: it knows shapes, not names or stories. The text is normalised
first (NFKC, without invisible characters), so that other scripts' digits and look-alikes of signs
do not pass. Every quantifier is bounded, so the time is linear in the text's length.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Final

_NUMBER_GAP: Final = r"[ .\-/]{0,2}"
_DATE: Final = r"(?:\d{4}[-./]\d{1,2}[-./]\d{1,2}|\d{1,2}[-./]\d{1,2}[-./]\d{4})(?![\w-])"

_PATTERNS: Final[tuple[tuple[str, re.Pattern[str]], ...]] = (
    ("[key]", re.compile(r"-----BEGIN [A-Z ]{0,30}PRIVATE KEY-----[^-]{0,10000}(?:-----END)?")),
    # Well-known beginnings of keys and tokens: OpenAI, GitHub, Slack, AWS, Google, GitLab, ours.
    (
        "[key]",
        re.compile(
            r"(?<![A-Za-z0-9])(?:sk|pk|rk|gh[pousr]|github_pat|xox[abeprs]|glpat|hf|sg|npm|pypi)"
            r"[-_][A-Za-z0-9_\-]{12,512}|(?<![A-Za-z0-9])(?:AKIA|ASIA)[A-Z0-9]{12,40}"
            r"|(?<![A-Za-z0-9])AIza[A-Za-z0-9_\-]{30,60}"
        ),
    ),
    # A JSON web token.
    (
        "[key]",
        re.compile(
            r"(?<![A-Za-z0-9_\-])eyJ[A-Za-z0-9_\-]{8,4000}"
            r"\.[A-Za-z0-9_\-]{0,4000}\.?[A-Za-z0-9_\-]{0,4000}"
        ),
    ),
    ("[key]", re.compile(r"(?i)\b(?:bearer|basic) {1,3}[A-Za-z0-9+/._~\-]{12,4000}={0,2}")),
    # A value after a word that says what it is.
    (
        "[key]",
        re.compile(
            r"(?i)\b(?:password|passwd|pwd|passphrase|secret|api[_ \-]?key|token)"
            r"\b[\"']?\s{0,3}(?:[:=]|\bis\b)\s{0,3}[^\s,;]{1,512}"
        ),
    ),
    ("[email]", re.compile(r"[\w.!#$%&'*+/=?^`{|}~\-]{1,64}@(?:[\w\-]{1,63}\.){1,8}[\w\-]{2,63}")),
    # Long runs of what random bytes look like when they are written: digits and letters mixed.
    (
        "[key]",
        re.compile(
            r"(?<![\w+/\-])(?=[A-Za-z+/_\-]{0,64}\d)(?=[\d+/_\-]{0,64}[A-Za-z])"
            r"[A-Za-z0-9+/_\-]{32,4000}={0,2}"
        ),
    ),
    # Bank accounts as IBAN, in groups or not.
    ("[account]", re.compile(r"(?i)\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b")),
    (
        "[ip]",
        re.compile(
            r"(?<![\w.])(?:25[0-5]|2[0-4]\d|1?\d?\d)(?:\.(?:25[0-5]|2[0-4]\d|1?\d?\d)){3}(?![\w]|\.\d)"
        ),
    ),
    # IPv6: at least three colons among hexadecimal, or a double one.
    (
        "[ip]",
        re.compile(
            r"(?i)(?<![\w:])(?:[0-9a-f]{1,4}:){7}[0-9a-f]{1,4}(?![\w:])"
            r"|(?<![\w:])(?:[0-9a-f]{1,4}(?::[0-9a-f]{1,4}){0,6})?::"
            r"(?:[0-9a-f]{1,4}(?::[0-9a-f]{1,4}){0,6})(?![\w:])"
        ),
    ),
    # Cards, and accounts that are digits: twelve and more, in groups or not.
    ("[number]", re.compile(rf"(?<![\w.])\d(?:{_NUMBER_GAP}\d){{11,33}}(?!\w)")),
    # Telephones: with + or 00 or brackets, or seven and more digits in groups.
    (
        "[phone]",
        re.compile(
            rf"(?<!\w)(?:\+|00){_NUMBER_GAP}\d(?:[ .\-/()]{{0,3}}\d){{6,14}}(?!\w)"
            r"|(?<!\w)\(\d{1,5}\)(?:[ .\-/]{0,3}\d){5,12}(?!\w)"
            rf"|(?<![\w.])(?!{_DATE})\d(?:{_NUMBER_GAP}\d){{6,10}}(?!\w)"
        ),
    ),
)


def normalised(text: str) -> str:
    """``text`` as ``redacted`` sees it; that may be up to 18 times as long."""
    return "".join(
        character
        for character in unicodedata.normalize("NFKC", text)
        # Invisible ones would cut a number in two.
        if unicodedata.category(character) != "Cf"
    )


def redacted(text: str) -> str:
    """``text``, normalised, with placeholders such as ``[email]``."""
    plain = normalised(text)
    for placeholder, pattern in _PATTERNS:
        plain = pattern.sub(placeholder, plain)
    return plain
