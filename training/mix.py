"""The rows that a guard is trained on, built from declared sources.

A mix (``configs/mixes/*.yaml``) lists files of labelled examples with a licence for each source
that they hold. On the way in, rows are dropped that are empty, that contradict each other, that
repeat another row word for word or nearly, or that repeat a text kept back for evaluation; each
reason is counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, cast

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from training import signals
from training.labelled import Example, LabelError, data_file, read_examples, read_rows
from training.overlap import Fingerprint, OverlapIndex, fingerprint, read_hashes
from training.published import Dropped, Schema, read_published
from training.signals import Signals
from training.split import digest, normal, position

_NEAR: Final = 0.9
"""Rows that share more of their 5-grams, both ways, and their labels are one row."""


class Source(BaseModel):
    """One file of a mix."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: str
    """See ``labelled.data_file``."""
    kind: Literal["labelled", "instructions", "pku_saferlhf", "beavertails", "beavertails_v"] = (
        "labelled"
    )
    """``instructions``: prompts with answers and no labels, both taken as harmless; the rest are
    datasets in the form in which they are published."""
    cap: int | None = Field(default=None, ge=1)
    """The most rows taken, drawn at random."""
    weight: float = Field(default=1.0, gt=0)
    """Of each row in the loss."""
    exclude: tuple[str, ...] = ()
    """Original sources whose rows are not taken."""
    injection: bool | Literal["unsafe"] | None = None
    """Whether its prompts attack the model; ``unsafe``: as the source's flag says."""
    labels: Literal["own", "signals", "teacher"] = "own"
    """``signals``: the source's flag is not about harm, and labels injection at most; ``teacher``:
    its flag is not to be trusted, so that its rows wait for a teacher's scores."""


class MixConfig(BaseModel):
    """A mix: sources that one licence covers."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    licence: str
    """Under which weights that saw it may be given away."""
    kept_apart: tuple[str, ...] = ()
    """Files of evaluation texts, labelled (a pattern may stand for several) or ``.hashes.gz``."""
    sources: tuple[Source, ...]
    """On a text that two files hold, the labels of the file that stands first are taken."""
    licences: dict[str, str] = {}
    """Licence of each original source, for the card."""


@dataclass(frozen=True, slots=True)
class Row:
    """A training example with the labels of the four signals and its weight in the loss."""

    example: Example
    signals: Signals
    weight: float = 1.0
    everyday: bool = False
    """Plainly harmless, and not about harm: fit to stand around other texts."""
    needs_teacher: bool = False
    """Nobody labelled its harm: without a teacher's scores it is left out."""

    @property
    def key(self) -> bytes:
        """What makes two rows the same: role and words, those of the turns before included."""
        example = self.example
        words = [example.role, *(normal(turn.text) for turn in example.turns)]
        words.append(normal(example.prompt))
        if example.response is not None:
            words.append(normal(example.response))
        return digest("\n".join(words))[:16]


@dataclass(frozen=True, slots=True)
class Mix:
    """Rows for fitting and rows held out for calibration; no prompt stands in both."""

    fit: tuple[Row, ...]
    held_out: tuple[Row, ...]
    dropped: Mapping[str, int]
    """Rows that were not taken, by reason."""

    def counts(self) -> Mapping[str, int]:
        """Rows of each original source, in both parts."""
        return Counter(row.example.source for row in (*self.fit, *self.held_out))

    def report(self) -> dict[str, Any]:
        """What was taken and what was not, for people and for the card."""
        rows = (*self.fit, *self.held_out)
        return {
            "fit": len(self.fit),
            "held_out": len(self.held_out),
            "dropped": dict(self.dropped),
            "roles": dict(Counter(row.example.role for row in rows)),
            "severity": dict(Counter(str(row.example.severity) for row in rows)),
            "languages": dict(Counter(row.example.lang for row in rows).most_common()),
            "sources": dict(sorted(self.counts().items())),
        }


def build(directory: Path, mixes: Sequence[MixConfig], held_out_share: float, seed: int) -> Mix:
    """Reads and joins the mixes; ``LabelError`` names a file and line that is wrong."""
    generator = np.random.default_rng(seed)
    kept_apart = _kept_apart(directory, [name for mix in mixes for name in mix.kept_apart])
    near = _NearCopies()
    seen: set[bytes] = set()
    dropped: Counter[str] = Counter()
    fit: list[Row] = []
    held_out: list[Row] = []
    for source in (source for mix in mixes for source in mix.sources):
        rows = []
        for row in _of_one_mind(list(_rows(directory, source, dropped)), dropped):
            if row.key in seen:
                dropped["repeated"] += 1
            else:
                seen.add(row.key)
                rows.append(row)
        if source.cap is not None and len(rows) > source.cap:
            kept = sorted(generator.choice(len(rows), source.cap, replace=False))
            dropped["over the cap"] += len(rows) - source.cap
            rows = [rows[index] for index in kept]
        for row in rows:
            fault = _fault(row, near, kept_apart)
            if fault:
                dropped[fault] += 1
                continue
            # By prompt, so that the answers to one question stay on one side.
            is_held_out = position(row.example.prompt) < held_out_share
            (held_out if is_held_out else fit).append(row)
    return Mix(tuple(fit), tuple(held_out), dropped)


def unseen_answers(directory: Path, mixes: Sequence[MixConfig], mix: Mix) -> list[str]:
    """Everyday answers that a cap left out of ``mix``; all everyday ones where none did."""
    taken = {row.key for row in mix.fit}
    rows = [
        row
        for one in mixes
        for source in one.sources
        if source.kind == "instructions"
        for row in _rows(directory, source, Counter())
        if row.example.response is not None
    ]
    unseen = [row for row in rows if row.key not in taken] or rows
    return [row.example.text for row in unseen]


def _fault(row: Row, near: _NearCopies, kept_apart: OverlapIndex) -> str | None:
    """Why a row is not taken, None where it is."""
    prompt, text = fingerprint(row.example.prompt), fingerprint(row.example.text)
    if kept_apart.repeats(prompt) or (text != prompt and kept_apart.repeats(text)):
        return "kept apart for evaluation"
    if near.holds(row, text):
        return "nearly repeated"
    return None


class _NearCopies:
    """The rows so far, to recognise one that differs from another by a word or two."""

    def __init__(self) -> None:
        self._index = OverlapIndex(most_holders=200)
        self._labels: list[tuple[Any, ...]] = []

    def holds(self, row: Row, text: Fingerprint) -> bool:
        example = row.example
        # Neighbours whose labels differ teach where the line is: both stay.
        labels = (example.role, example.unsafe, example.severity, row.signals)
        for match in self._index.matches(text):
            if match.of_text < _NEAR:
                break
            # Equal short answers to different questions are not the same.
            is_short = example.response is not None and len(text.grams) <= 20
            if match.of_indexed >= _NEAR and self._labels[match.number] == labels and not is_short:
                return True
        self._index.add(text)
        self._labels.append(labels)
        return False


def _kept_apart(directory: Path, names: Sequence[str]) -> OverlapIndex:
    index = OverlapIndex()
    for name in names:
        paths = sorted(directory.glob(name))
        if not paths:
            raise LabelError(f"{directory / name}: no such file of texts to keep apart")
        for path in paths:
            if path.suffix == ".gz":
                items = read_hashes(path)
            else:
                items = [fingerprint(example.text) for example in read_examples(path)]
            for item in items:
                index.add(item)
    return index


def _of_one_mind(rows: list[Row], dropped: Counter[str]) -> list[Row]:
    """The rows of one file without those that call one text both safe and unsafe."""
    verdicts: dict[bytes, set[bool]] = {}
    for row in rows:
        if row.example.unsafe is not None:
            verdicts.setdefault(row.key, set()).add(row.example.unsafe)
    agreed = [row for row in rows if len(verdicts.get(row.key, ())) < 2]
    dropped["contradictory"] += len(rows) - len(agreed)
    return agreed


def _rows(directory: Path, source: Source, dropped: Counter[str]) -> Iterator[Row]:
    for example in _read(data_file(directory, source.file), source.kind):
        if isinstance(example, Dropped):
            dropped[example.reason] += 1
            continue
        if example.source in source.exclude:
            continue
        if not example.text.strip():
            dropped["empty"] += 1
            continue
        injection = example.unsafe if source.injection == "unsafe" else source.injection
        if source.labels != "own":
            example = example.model_copy(
                update={"unsafe": None, "severity": None, "pku_categories": None}
            )
        yield Row(
            example,
            signals.label(example, injection),
            source.weight,
            everyday=source.kind == "instructions",
            needs_teacher=source.labels == "teacher",
        )


def _read(path: Path, kind: str) -> Iterator[Example | Dropped]:
    if kind == "labelled":
        yield from read_examples(path)
    elif kind == "instructions":
        yield from _harmless(path)
    else:
        yield from read_published(path, cast(Schema, kind))


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
