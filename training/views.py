"""What a guard will be asked about, made from whole examples.

Two kinds. *Excerpts* are new rows: beginnings of answers as a stream shows them, and pieces of
long texts as windows show them. Of a harmless text every piece is harmless. A beginning of a
harmful one is harmful from where its harm stands: where that is not marked, its pieces carry no
label but a teacher's. *Views* are other ways in which the same text
arrives, drawn anew each epoch, with the text's own labels: written to deceive a filter, in the
middle of a longer text, after other turns, as a field of a request, or under a jailbreak's frame.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from numpy.random import Generator
from pydantic import BaseModel, ConfigDict, Field

from models.sentences import sentence_ends
from models.taxonomy import SIGNALS
from training.documents import document
from training.labelled import Example, PastTurn
from training.mix import Row
from training.obfuscation import OBFUSCATIONS
from training.signals import Signals

_INJECTION: Final = SIGNALS.index("injection")
_LONGEST_FRAME: Final = 700
"""Characters of a jailbreak's frame: with a longer one the first window would miss the text."""
_LONGEST_EMBEDDED: Final = 700
_SHORTEST_BEGINNING: Final = 15
_PIECE_CHARACTERS: Final = 900
"""About a window."""
_GOAL_MARK: Final = "[INSERT PROMPT HERE]"


class ViewShares(BaseModel):
    """How often a row is shown in each way; the rest is shown as it is."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    obfuscated: float = Field(default=0.08, ge=0, le=1)
    embedded: float = Field(default=0.05, ge=0, le=1)
    turns: float = Field(default=0.05, ge=0, le=1)
    field: float = Field(default=0.04, ge=0, le=1)
    framed: float = Field(default=0.02, ge=0, le=1)
    """Prompts only."""


@dataclass(frozen=True, slots=True)
class Surroundings:
    """Texts to put around others: plainly harmless exchanges, and frames of jailbreaks."""

    exchanges: tuple[tuple[str, str], ...]
    """Prompt and answer."""
    frames: tuple[str, ...]

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Surroundings:
        """Those that a mix holds."""
        exchanges = tuple(
            (row.example.prompt, row.example.response)
            for row in rows
            if row.everyday and row.example.response is not None
        )
        frames = tuple(
            row.example.prompt
            for row in rows
            if row.example.role == "prompt"
            and row.signals[_INJECTION]
            and row.example.unsafe is None
            and len(row.example.prompt) <= _LONGEST_FRAME
        )
        return cls(exchanges, frames)


def view(row: Row, shares: ViewShares, around: Surroundings, generator: Generator) -> Row:
    """``row`` in one of the ways that it may arrive."""
    draw = generator.random()
    for share, change in (
        (shares.obfuscated, _obfuscated),
        (shares.embedded, _embedded),
        (shares.turns, _after_turns),
        (shares.field, _as_field),
        (shares.framed, _framed),
    ):
        if draw < share:
            return change(row, around, generator)
        draw -= share
    return row


def excerpts(
    rows: Sequence[Row], most_a_row: int, documents: int, generator: Generator
) -> list[Row]:
    """Beginnings and pieces of the rows, and pieces of ``documents`` long harmless texts."""
    result: list[Row] = []
    for row in rows:
        example = row.example
        if example.response is not None:
            ends = [end for end in sentence_ends(example.response) if end > _SHORTEST_BEGINNING]
            # Where the harm is marked, both sides of the mark are worth more than the rest.
            most = most_a_row if example.first_harmful_end is None else 2 * most_a_row
            chosen = sorted(generator.permutation(max(len(ends) - 1, 0))[:most])
            result += [_beginning(row, ends[place], number) for number, place in enumerate(chosen)]
        if len(example.text) > 1.5 * _PIECE_CHARACTERS:
            result.append(_excerpt(row, _piece(example.text, generator), len(result)))
    exchanges = Surroundings.of(rows).exchanges
    if exchanges:
        result += [_document(exchanges, number, generator) for number in range(documents)]
    return result


def _beginning(row: Row, end: int, number: int) -> Row:
    """The answer up to ``end``: harmful from where its harm is marked, harmless before."""
    example = row.example
    first = example.first_harmful_end
    if first is None or example.response is None:
        return _excerpt(row, example.text[:end], number)
    if end >= first:
        labels: dict[str, Any] = {}
    else:
        labels = {"unsafe": False, "severity": 0, "pku_categories": (), "first_harmful_end": None}
    labels |= {"response": example.response[:end], "id": f"{example.id}-excerpt-{number}"}
    return Row(example.model_copy(update=labels), _without_refusal(row.signals), row.weight)


def _excerpt(row: Row, text: str, number: int) -> Row:
    example = row.example
    field = "prompt" if example.response is None else "response"
    changed: dict[str, Any] = {field: text, "id": f"{example.id}-excerpt-{number}"}
    signals = row.signals
    if example.unsafe:
        changed |= {"unsafe": None, "severity": None, "pku_categories": None}
        signals = (None,) * len(SIGNALS)
    if example.refusal:
        # A refusal stands at the start; what begins as one may go on otherwise.
        changed["refusal"] = None
        signals = _without_refusal(signals)
    needs_teacher = row.needs_teacher or bool(example.unsafe)
    return Row(example.model_copy(update=changed), signals, row.weight, needs_teacher=needs_teacher)


def _without_refusal(signals: Signals) -> Signals:
    place = SIGNALS.index("refusal")
    return (*signals[:place], None, *signals[place + 1 :])


def _piece(text: str, generator: Generator) -> str:
    """About a window's worth of ``text``, from any word on."""
    start = int(generator.integers(len(text) - _PIECE_CHARACTERS))
    blank = text.find(" ", start, start + 40)
    start = start if blank < 0 else blank + 1
    return text[start : start + _PIECE_CHARACTERS]


def _document(exchanges: Sequence[tuple[str, str]], number: int, generator: Generator) -> Row:
    answers = [answer for _, answer in exchanges]
    text = _piece(document(answers, 2 * _PIECE_CHARACTERS, generator), generator)
    labels: dict[str, Any] = {"unsafe": False, "severity": 0, "pku_categories": ()}
    labels |= {"id": f"joined-{number}", "source": "joined_answers"}
    if number % 2:
        example = Example(role="prompt", prompt=text, **labels)
    else:
        prompt = exchanges[int(generator.integers(len(exchanges)))][0]
        example = Example(role="response", prompt=prompt, response=text, refusal=False, **labels)
    return Row(example, (False,) * len(SIGNALS))


def _with_text(row: Row, text: str) -> Row:
    field = "prompt" if row.example.response is None else "response"
    return replace(row, example=row.example.model_copy(update={field: text}))


def _obfuscated(row: Row, around: Surroundings, generator: Generator) -> Row:
    names = sorted(OBFUSCATIONS)
    if row.example.role == "response" or len(row.example.text) > 300:
        names.remove("base64")
    name = names[int(generator.integers(len(names)))]
    return _with_text(row, OBFUSCATIONS[name](row.example.text, generator))


def _embedded(row: Row, around: Surroundings, generator: Generator) -> Row:
    if not around.exchanges or len(row.example.text) > _LONGEST_EMBEDDED:
        return row
    prompt, answer = around.exchanges[int(generator.integers(len(around.exchanges)))]
    filler = answer if row.example.response is not None or generator.random() < 0.7 else prompt
    before = filler[: int(generator.integers(20, 400))]
    before = before[: before.rfind(" ") + 1].rstrip()
    rest = filler[len(before) : len(before) + int(generator.integers(1, 200))].strip()
    mark = ("\n\n", "\n", " ")[int(generator.integers(3))]
    parts = [part for part in (before, row.example.text, rest) if part]
    if generator.random() < 0.3:
        parts.remove(before) if before else None
    return _with_text(row, mark.join(parts))


def _after_turns(row: Row, around: Surroundings, generator: Generator) -> Row:
    if not around.exchanges or row.example.turns:
        return row
    turns: list[PastTurn] = []
    if generator.random() < 0.3:
        turns.append(
            PastTurn(speaker="system", text=_SYSTEM[int(generator.integers(len(_SYSTEM)))])
        )
    for _ in range(int(generator.integers(1, 3))):
        prompt, answer = around.exchanges[int(generator.integers(len(around.exchanges)))]
        turns += [
            PastTurn(speaker="user", text=prompt[:400]),
            PastTurn(speaker="assistant", text=answer[:400]),
        ]
    return replace(row, example=row.example.model_copy(update={"turns": tuple(turns)}))


def _as_field(row: Row, around: Surroundings, generator: Generator) -> Row:
    text = row.example.text
    forms = _RESPONSE_FORMS if row.example.response is not None else _PROMPT_FORMS
    form = forms[int(generator.integers(len(forms)))]
    # Some fields arrive as JSON in a string.
    inner = json.dumps(text)[1:-1] if form.lstrip().startswith("{") else text
    return _with_text(row, form.replace("%s", inner))


def _framed(row: Row, around: Surroundings, generator: Generator) -> Row:
    example = row.example
    is_frame = bool(row.signals[_INJECTION])
    if example.role == "response" or is_frame or not around.frames or len(example.text) > 400:
        return row
    frame = around.frames[int(generator.integers(len(around.frames)))]
    if _GOAL_MARK in frame:
        text = frame.replace(_GOAL_MARK, example.text)
    else:
        text = f"{frame}\n\n{example.text}"
    signals = (*row.signals[:_INJECTION], True, *row.signals[_INJECTION + 1 :])
    return replace(_with_text(row, text), signals=signals)


_SYSTEM: Final = (
    "You are a helpful assistant.",
    "You are a customer service agent of an online shop. Answer briefly.",
    "You are a careful tutor. Explain step by step.",
    "Answer in plain text, without markdown.",
    "You help engineers with their code base and may call tools.",
)
# How the fields of a request and of an answer look: documents, tool results and definitions,
# system messages, prefill; arguments of tool calls, reasoning.
_PROMPT_FORMS: Final = (
    "You are a helpful assistant.\n%s",
    "Title: notes\n\n%s",
    '{"status": "ok", "result": "%s"}',
    '{"title": "page 1", "content": "%s", "source": "web"}',
    "search_web\nSearches the web and returns the first results.\nquery\n%s",
    "Summarise the following text:\n\n%s",
    "Translate into French: %s",
    "> %s\n\nWhat do you think of this?",
    "Subject: hello\n\n%s\n\nBest regards",
)
_RESPONSE_FORMS: Final = (
    "send_message\nteam@example.com\n%s",
    "write_file\nnotes.txt\n%s",
    '{"answer": "%s"}',
    "The user asks this. I should think about what they want.\n%s",
    "Sure! Here is what you asked for:\n\n%s",
    "```\n%s\n```",
    "**Answer**\n\n%s\n\nLet me know if you need anything else.",
)
