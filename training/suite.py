"""Suites: which files a guard is measured on, which of their rows, and what else is measured.

A suite names files relative to a directory of data. Of most files only the rows are taken that
calibration never reads: what is tuned on is not reported.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, model_validator

from models.taxonomy import Role
from training.columns import Positive
from training.labelled import Example, LabelError, data_file, read_examples, read_rows
from training.recipe import read_recipe
from training.split import CALIBRATION_SHARE, position
from training.streams import Stream, stream

Group = Literal["prompt", "response", "harmless", "injection"]
"""Which of the suite's means a set counts in."""
Half = Literal["evaluation", "whole"]

DEFAULT_SUITE: Final = Path(__file__).parent / "configs" / "suite.yaml"
"""What a release is measured on."""

T = TypeVar("T")


class _Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SetConfig(_Config):
    """Some rows of one file."""

    name: str = Field(pattern=r"^[\w-]+$")
    file: Path
    group: Group
    role: Role | None = None
    """Only rows of this role; all where None."""
    half: Half = "evaluation"
    limit: PositiveInt | None = None
    """At most so many rows, always the same ones."""
    positive: Positive = "unsafe"


class RobustnessConfig(_Config):
    """How many of the sets' prompts are written in other ways."""

    limit: PositiveInt


class LongTextsConfig(_Config):
    """Documents joined from the texts of ``harmless``; one text of ``harmful`` goes in each.

    The rows of ``harmless`` need no labels; those labelled unsafe are left out.
    """

    harmless: Path
    harmful: Path
    lengths: tuple[PositiveInt, ...]
    """In characters."""
    documents: PositiveInt
    """Of each length."""
    half: Half = "evaluation"


class StreamsConfig(_Config):
    """Answers that are judged at the end of each sentence, ``limit`` of each class."""

    file: Path
    first_harmful: Path | None = None
    """Lines ``{"id", "first_harmful_end"}``: the offset after its first harmful sentence.

    Harmful answers that are not in it are left out; without it, all are taken.
    """
    half: Half = "evaluation"
    limit: PositiveInt


class SuiteConfig(_Config):
    """A suite file."""

    name: str
    seed: NonNegativeInt = 0
    sets: tuple[SetConfig, ...] = Field(min_length=1)
    robustness: RobustnessConfig | None = None
    long_texts: LongTextsConfig | None = None
    streams: StreamsConfig | None = None

    @model_validator(mode="after")
    def _names_are_unique(self) -> SuiteConfig:
        names = [one.name for one in self.sets]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two sets are called {twice[0]!r}")
        return self


@dataclass(frozen=True, slots=True)
class EvaluationSet:
    """Rows that are reported together."""

    name: str
    group: Group | None
    positive: Positive
    examples: tuple[Example, ...]


@dataclass(frozen=True, slots=True)
class LongTexts:
    """What documents are made of."""

    harmless: tuple[str, ...]
    harmful: tuple[str, ...]
    lengths: tuple[int, ...]
    documents: int


@dataclass(frozen=True, slots=True)
class Suite:
    """All that is to be judged, read and checked. None, or empty, is not measured."""

    name: str
    sets: tuple[EvaluationSet, ...]
    prompts: tuple[Example, ...] = ()
    """For the figures of robustness."""
    long_texts: LongTexts | None = None
    streams: tuple[Stream, ...] = ()
    seed: int = 0


def read_suite(path: Path, directory: Path) -> Suite:
    """The suite of a file, with its rows from ``directory``.

    ``RecipeError`` says what is wrong with the suite, ``LabelError`` with a file that it names.
    """
    config = read_recipe(path, [], SuiteConfig)
    sets = tuple(_read_set(one, directory, config.seed) for one in config.sets)
    long_texts, streams = config.long_texts, config.streams
    return Suite(
        config.name,
        sets,
        _prompts(sets, config.robustness.limit, config.seed) if config.robustness else (),
        _read_long_texts(long_texts, directory) if long_texts else None,
        _read_streams(streams, directory, config.seed) if streams else (),
        config.seed,
    )


def files_as_suite(paths: Sequence[Path]) -> Suite:
    """Whole files as the sets of a suite, each named after its file."""
    sets: list[EvaluationSet] = []
    for path in paths:
        examples = tuple(read_examples(path))
        if not examples:
            raise LabelError(f"{path} holds no example")
        if any(one.name == path.stem for one in sets):
            raise LabelError(f"{path}: two files are called {path.stem}, as their figures would be")
        roles = {example.role for example in examples}
        group = roles.pop() if len(roles) == 1 else None
        sets.append(EvaluationSet(path.stem, group, "unsafe", examples))
    return Suite("files", tuple(sets))


def sample(items: Sequence[T], limit: int | None, seed: int) -> list[T]:
    """At most ``limit`` of the items, always the same ones, in their order."""
    if limit is None or len(items) <= limit:
        return list(items)
    chosen = np.random.default_rng(seed).choice(len(items), limit, replace=False)
    return [items[place] for place in sorted(chosen.tolist())]


def _is_reported(prompt: str, half: Half) -> bool:
    return half == "whole" or position(prompt) >= CALIBRATION_SHARE


def _read_set(config: SetConfig, directory: Path, seed: int) -> EvaluationSet:
    path = directory / config.file
    rows = [
        example
        for example in read_examples(path)
        if config.role in (None, example.role) and _is_reported(example.prompt, config.half)
    ]
    if not rows:
        raise LabelError(f"{path} holds no row for the set {config.name}")
    examples = tuple(sample(rows, config.limit, seed))
    return EvaluationSet(config.name, config.group, config.positive, examples)


def _prompts(sets: Sequence[EvaluationSet], limit: int, seed: int) -> tuple[Example, ...]:
    """Half of them harmful, so that both recall and false flags can be told."""
    rows = [
        example
        for one in sets
        for example in one.examples
        if one.positive == "unsafe" and example.role == "prompt"
    ]
    harmful = [row for row in rows if row.unsafe]
    harmless = [row for row in rows if row.unsafe is False]
    half = max(limit // 2, 1)
    return (*sample(harmful, half, seed), *sample(harmless, half, seed))


def _read_long_texts(config: LongTextsConfig, directory: Path) -> LongTexts:
    def texts(path: Path, unsafe: bool) -> tuple[str, ...]:
        found = [
            str(row.get("response") or row.get("prompt") or "").strip()
            for _, row in read_rows(path)
            if (row.get("unsafe") is True) == unsafe
            and _is_reported(str(row.get("prompt")), config.half)
        ]
        if not any(found):
            raise LabelError(f"{path} holds no text to make documents of")
        return tuple(text for text in found if text)

    return LongTexts(
        texts(directory / config.harmless, unsafe=False),
        texts(directory / config.harmful, unsafe=True),
        config.lengths,
        config.documents,
    )


def _read_streams(config: StreamsConfig, directory: Path, seed: int) -> tuple[Stream, ...]:
    path = directory / config.file
    answers = [
        example
        for example in read_examples(path)
        if example.role == "response" and _is_reported(example.prompt, config.half)
    ]
    harmful = [stream(one, None) for one in answers if one.unsafe and one.text]
    harmless = [stream(one, None) for one in answers if one.unsafe is False and one.text]
    if config.first_harmful:
        harmful = _located(harmful, data_file(directory, config.first_harmful))
    if not harmful:
        raise LabelError(f"{path} holds no harmful answer that can be judged as a stream")
    return (*sample(harmful, config.limit, seed), *sample(harmless, config.limit, seed))


def _located(streams: Sequence[Stream], path: Path) -> list[Stream]:
    ends = _first_harmful_ends(path)
    examples = [one.example for one in streams if one.example.id in ends]
    try:
        return [stream(one, ends[one.id]) for one in examples]
    except ValueError as error:
        raise LabelError(f"{path}: {error}") from error


def _first_harmful_ends(path: Path) -> dict[str, int]:
    ends = {}
    for number, row in read_rows(path):
        name, end = row.get("id"), row.get("first_harmful_end")
        if not isinstance(name, str) or type(end) is not int:
            raise LabelError(f"{path}, line {number}: needs an id and a whole first_harmful_end")
        ends[name] = end
    return ends
