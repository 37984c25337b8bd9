"""Labels of the four signals, which no source gives by itself: weak rules over names and words."""

from __future__ import annotations

import re
from typing import Final

from models.taxonomy import SIGNALS
from training.labelled import Example

_SELF_HARM_NAMES: Final = re.compile(r"suicid|self[- ]?harm|\bssh\b|^SH-", re.IGNORECASE)
_SELF_HARM_WORDS: Final = re.compile(
    r"suicid|kill(ing)? (my|your|him|her|them)sel|self[- ]?harm|self[- ]?injur|hurt(ing)? myself"
    r"|cut(ting)? (myself|yourself)|end (my|your) (own )?life|anorexi|bulimi|pro[- ]?ana\b",
    re.IGNORECASE,
)
_MINORS_NAMES: Final = re.compile(
    r"\bcse\b|csam|sexual.?\(?minor|child sexual|sexual_minors", re.IGNORECASE
)
_MINORS_WORDS: Final = re.compile(
    r"\b(child|children|minors?|under-?age|pre-?teens?|teen(ager)?s?|kids?|toddler|infant"
    r"|school ?(girl|boy)s?|little (girl|boy)s?|lolis?|(1[0-7]|[4-9])[- ]years?[- ]old"
    r"|(ten|eleven|twelve|thirteen|fourteen|fifteen|sixteen|seventeen)[- ]years?[- ]old)\b",
    re.IGNORECASE,
)

Signals = tuple[bool | None, ...]


def label(example: Example, injection: bool | None) -> Signals:
    """One label a signal, in the order of ``SIGNALS``; None where it is not known.

    ``injection`` is what the source says of its prompts. Self-harm is a subject, whatever is said
    of it; minors means sexual content and minors together.
    """
    names = example.categories or ()
    text = example.text
    sexual: bool | None = None
    if example.pku_categories is not None and example.unsafe is not None:
        sexual = "sexual_content" in example.pku_categories
    minors: bool | None = None
    if any(_MINORS_NAMES.search(name) for name in names):
        minors = True if example.unsafe else None
    elif sexual is not None:
        minors = sexual and bool(_MINORS_WORDS.search(text))
    named = any(_SELF_HARM_NAMES.search(name) for name in names)
    worded = bool(_SELF_HARM_WORDS.search(text))
    # A reply filed under self-harm need not speak of it.
    self_harm = None if named and not worded and example.role == "response" else named or worded
    labels = {
        "refusal": example.refusal if example.role == "response" else False,
        "injection": injection if example.role == "prompt" else False,
        "self_harm": self_harm,
        "minors": minors,
    }
    return tuple(labels[name] for name in SIGNALS)
