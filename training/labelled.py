"""Labelled examples: one JSON line each, wherever the project reads or writes labels."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from models.inputs import GuardInput, Speaker, Turn
from models.taxonomy import CATEGORIES, Role
from training import transcript


class LabelError(ValueError):
    """A labelled file that cannot be used; the message names the file, the line and the fault."""


class PastTurn(BaseModel):
    """One turn of a conversation before the target."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    speaker: Speaker
    text: str


class Example(BaseModel):
    """A text with the labels that somebody gave it; None where nobody did.

    ``prompt`` is judged where ``role`` is prompt; else ``response`` is, in the prompt's context.
    Keys that only describe where a row came from are kept in ``model_extra``.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    id: str
    source: str
    role: Role
    prompt: str
    response: str | None = None
    unsafe: bool | None = None
    severity: int | None = Field(default=None, ge=0, le=3)
    categories: tuple[str, ...] | None = None
    """In the source's own names."""
    pku_categories: tuple[str, ...] | None = None
    refusal: bool | None = None
    first_harmful_end: int | None = Field(default=None, ge=1)
    """Offset in a harmful response just after the sentence in which its harm begins."""
    lang: str = "en"
    turns: tuple[PastTurn, ...] = ()

    @model_validator(mode="after")
    def _is_consistent(self) -> Example:
        unknown = sorted(self.model_extra.keys() - _PROVENANCE) if self.model_extra else []
        if unknown:
            raise ValueError(f"key {unknown[0]!r} is unknown")
        if self.role == "response" and self.response is None:
            raise ValueError("role is response, but there is no response")
        both = self.severity is not None and self.unsafe is not None
        if both and self.unsafe != bool(self.severity):
            raise ValueError(f"unsafe is {self.unsafe}, but severity is {self.severity}")
        for name in self.pku_categories or ():
            if name not in CATEGORIES:
                raise ValueError(f"pku_categories: {name!r} is not one of the 19 categories")
        if self.first_harmful_end is not None:
            if not self.unsafe or self.response is None:
                raise ValueError("first_harmful_end is set, but the row is no harmful response")
            if self.first_harmful_end > len(self.response):
                raise ValueError("first_harmful_end lies beyond the response")
        if self.pku_categories and self.unsafe is False:
            raise ValueError("unsafe is false, but pku_categories is not empty")
        return self

    @property
    def text(self) -> str:
        """The text that the labels speak of."""
        return self.prompt if self.response is None else self.response

    def guard_input(self) -> GuardInput:
        """The example as a guard reads it; a conversation written into the prompt as turns."""
        past = tuple(Turn(turn.speaker, turn.text) for turn in self.turns)
        earlier, prompt = transcript.parse(self.prompt)
        past = (*past, *earlier)
        if self.response is None:
            return GuardInput("prompt", prompt, past)
        return GuardInput("response", self.response, (*past, Turn("user", prompt)))


_PROVENANCE = frozenset(
    {
        "annotated",
        "disputed",
        "dolly_order",
        "images",
        "judged_in_part",
        "name",
        "near",
        "pair",
        "part",
        "passes",
        "prompt_source",
        "rater_fraction_unsafe",
        "source_grade",
        "source_unsafe",
    }
)


def data_file(directory: Path, name: str | Path) -> Path:
    """``name`` in the data directory or, where it is not there, among the project's own files."""
    own = Path(__file__).parent / name
    path = directory / name
    return own if own.exists() and not path.exists() else path


def read_examples(path: Path) -> Iterator[Example]:
    """The examples of a JSON-lines file; ``LabelError`` names the first line that is wrong."""
    for number, row in read_rows(path):
        try:
            yield Example.model_validate(row)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            message = first["msg"].removeprefix("Value error, ")
            place = f"{path}, line {number}" + (f", key {where}" if where else "")
            raise LabelError(f"{place}: {message}") from None


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers and objects of a JSON-lines file (also ``.gz``); blank lines are passed over."""
    try:
        opened = gzip.open if path.suffix == ".gz" else open
        file = opened(path, "rt", encoding="utf-8")
    except OSError as error:
        raise LabelError(f"{path} cannot be read: {error.strerror}") from error
    with file:
        try:
            for number, line in enumerate(file, 1):
                if line.strip():
                    try:
                        row = json.loads(line)
                    except ValueError as error:
                        raise LabelError(f"{path}, line {number}: not JSON") from error
                    if not isinstance(row, dict):
                        raise LabelError(f"{path}, line {number}: not a JSON object")
                    yield number, row
        except UnicodeDecodeError as error:
            raise LabelError(f"{path} is not UTF-8") from error
        except (EOFError, OSError, zlib.error) as error:
            raise LabelError(f"{path} cannot be read: {error}") from error
