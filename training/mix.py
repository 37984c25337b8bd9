"""The rows that a guard is trained on, built from declared sources.

A recipe (``configs/*.yaml``) lists files of labelled examples with a cap and with what the source's
own label says about the four signals. Rows of the same text and role are taken once, from the file
that is listed first.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from models.taxonomy import SIGNALS
from training.labelled import Example, LabelError, read_examples, read_rows


class Source(BaseModel):
    """One file of the mix."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: str
    """Relative to the recipe's data directory."""
    kind: Literal["labelled", "instructions"] = "labelled"
    """``instructions``: prompts with answers and no labels, both taken as harmless."""
    cap: int | None = None
    injection: bool | Literal["unsafe"] | None = None
    """Whether its prompts attack the model; ``unsafe``: as the source's flag says."""
    harm: bool = True
    """False where the source's flag is not about harm, so that it labels only a signal."""


@dataclass(frozen=True, slots=True)
class Row:
    """A training example with the labels of the four signals, None where not known."""

    example: Example
    signals: tuple[bool | None, ...]


@dataclass(frozen=True, slots=True)
class Mix:
    """Rows for fitting and rows held out for calibration; no prompt stands in both."""

    fit: tuple[Row, ...]
    held_out: tuple[Row, ...]
    duplicates: int

    def counts(self) -> Mapping[str, int]:
        """Rows of each original source, in both parts."""
        return Counter(row.example.source for row in (*self.fit, *self.held_out))


def build(directory: Path, sources: Sequence[Source], held_out_share: float, seed: int) -> Mix:
    """Reads and joins the sources; ``LabelError`` names a file and line that is wrong."""
    generator = np.random.default_rng(seed)
    seen: set[bytes] = set()
    duplicates = 0
    fit: list[Row] = []
    held_out: list[Row] = []
    for source in sources:
        rows: list[Row] = []
        for row in _rows(directory, source):
            key = _digest(row.example.role + _normal(row.example.text))
            if key in seen:
                duplicates += 1
                continue
            seen.add(key)
            rows.append(row)
        if source.cap is not None and len(rows) > source.cap:
            kept = sorted(generator.choice(len(rows), source.cap, replace=False))
            rows = [rows[index] for index in kept]
        for row in rows:
            # By prompt, so that the answers to one question stay on one side.
            share = int.from_bytes(_digest(_normal(row.example.prompt))[:4], "big") / 2**32
            (held_out if share < held_out_share else fit).append(row)
    return Mix(tuple(fit), tuple(held_out), duplicates)


def _rows(directory: Path, source: Source) -> Iterator[Row]:
    path = directory / source.file
    if source.kind == "instructions":
        examples: Iterator[Example] = _harmless(path)
    else:
        examples = read_examples(path)
    for example in examples:
        if not example.text.strip():
            continue
        injection = example.unsafe if source.injection == "unsafe" else source.injection
        if not source.harm:
            example = example.model_copy(update={"unsafe": None, "severity": None})
        yield Row(example, _signals(example, injection))


def _harmless(path: Path) -> Iterator[Example]:
    for number, row in read_rows(path):
        try:
            labels: dict[str, Any] = {"unsafe": False, "severity": 0, "pku_categories": ()}
            labels |= {"source": row["source"], "prompt": row["prompt"], "lang": "en"}
            yield Example(id=f"{row['id']}-p", role="prompt", **labels)
            labels |= {"response": row["response"], "refusal": False}
            yield Example(id=f"{row['id']}-r", role="response", **labels)
        except KeyError as error:
            raise LabelError(f"{path}, line {number}: key {error} is missing") from error


# --- Signals that no source labels by itself: weak rules over names and words -------------------
_SELF_HARM_NAMES = re.compile(r"suicid|self[- ]?harm|\bssh\b|^SH-", re.IGNORECASE)
_SELF_HARM_WORDS = re.compile(
    r"suicid|kill(ing)? (my|your|him|her|them)sel|self[- ]?harm|self[- ]?injur|hurt(ing)? myself"
    r"|cut(ting)? (myself|yourself)|end (my|your) (own )?life|anorexi|bulimi|pro[- ]?ana\b",
    re.IGNORECASE,
)
_MINORS_NAMES = re.compile(
    r"\bcse\b|csam|sexual.?\(?minor|child sexual|sexual_minors", re.IGNORECASE
)
_MINORS_WORDS = re.compile(
    r"\b(child|children|minors?|under-?age|pre-?teens?|teen(ager)?s?|kids?|toddler|infant"
    r"|school ?(girl|boy)s?|little (girl|boy)s?|lolis?|(1[0-7]|[4-9])[- ]years?[- ]old"
    r"|(ten|eleven|twelve|thirteen|fourteen|fifteen|sixteen|seventeen)[- ]years?[- ]old)\b",
    re.IGNORECASE,
)


def _signals(example: Example, injection: bool | None) -> tuple[bool | None, ...]:
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


def _normal(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower())) or text


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
