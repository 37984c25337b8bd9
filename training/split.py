"""Which side of a split a text is on: decided by its prompt alone, so that answers go with it."""

from __future__ import annotations

import hashlib
import re


def normal(text: str) -> str:
    """The text's words in lower case, one blank apart; the text itself where it has none."""
    return " ".join(re.findall(r"\w+", text.lower())) or text


def digest(text: str) -> bytes:
    """SHA-256."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def position(prompt: str) -> float:
    """A place in [0, 1) that depends on the prompt's words alone, even over many prompts.

    The share below some bound is one side of a split: calibration sets lie below
    ``CALIBRATION_SHARE``, reported figures are over what lies above.
    """
    return int.from_bytes(digest(normal(prompt))[:4], "big") / 2**32


CALIBRATION_SHARE = 0.5
"""Share of a development set that calibration may read; the rest is only ever reported."""
