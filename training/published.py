"""Labels as their publishers wrote them, made labelled examples.

Readers of PKU-SafeRLHF (arXiv 2406.15513), BeaverTails (2307.04657) and the text of BeaverTails-V
(2503.17682). Each takes one row and gives an example an answer. Names of categories are mapped by
``models.taxonomy``; columns that are not read may be absent. What the publishers' own rules say
cannot be (a safe answer that is severe) is not learnt from, and not an error: it is a ``Dropped``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from models.taxonomy import BEAVERTAILS, BEAVERTAILS_V, PKU_SAFERLHF
from training.labelled import Example, LabelError, read_rows
from training.split import digest

Schema = Literal["pku_saferlhf", "beavertails", "beavertails_v"]

_Value = TypeVar("_Value")


@dataclass(frozen=True, slots=True)
class Dropped:
    """An answer that is not learnt from."""

    reason: str
    """Why; the same words for the same fault, so that they can be counted."""


_Reader = Callable[[Mapping[str, Any]], Iterator[Example | Dropped]]


def read_published(path: Path, schema: Schema) -> Iterator[Example | Dropped]:
    """The answers of a published file: JSON lines (also ``.gz``), or Parquet by its ``.parquet``.

    ``LabelError`` names the first row that lacks a field or has one of another type.
    """
    readers: dict[Schema, _Reader] = {
        "pku_saferlhf": pku_saferlhf,
        "beavertails": beavertails,
        "beavertails_v": beavertails_v,
    }
    reader = readers[schema]
    rows = _parquet_rows(path) if path.suffix == ".parquet" else read_rows(path)
    for number, row in rows:
        try:
            yield from reader(row)
        except LabelError as error:
            place = "row" if path.suffix == ".parquet" else "line"
            raise LabelError(f"{path}, {place} {number}: {error}") from None


def pku_saferlhf(row: Mapping[str, Any]) -> Iterator[Example | Dropped]:
    """Both answers of a row: harm, severity and the 19 categories.

    ``LabelError`` names a field that is missing or of another type.
    """
    prompt = _field(row, "prompt", str)
    for number in (0, 1):
        response = _field(row, f"response_{number}", str)
        safe = _field(row, f"is_response_{number}_safe", bool)
        severity = _field(row, f"response_{number}_severity_level", int)
        if severity not in range(4):
            raise LabelError(f"response_{number}_severity_level is {severity}, not 0 to 3")
        names = _flagged(row, f"response_{number}_harm_category", PKU_SAFERLHF)
        if safe != (severity == 0):
            yield Dropped("safe, but of some severity" if safe else "unsafe, but of no severity")
        else:
            categories = tuple(PKU_SAFERLHF[name] for name in names)
            yield _answer("pku_saferlhf", prompt, response, safe, names, categories, severity)


def beavertails(row: Mapping[str, Any]) -> Iterator[Example | Dropped]:
    """The answer of a row: harm, and the 14 categories as ours where all that it has map to ours.

    ``LabelError`` names a field that is missing or of another type. The dataset repeats a pair for
    each person who labelled it, and they may disagree.
    """
    names = _flagged(row, "category", BEAVERTAILS)
    ours = [BEAVERTAILS[name] for name in names]
    # Where one of them has no counterpart, ours are not known in full.
    categories = tuple(dict.fromkeys(one for each in ours for one in each)) if all(ours) else None
    yield _answer(
        "beavertails",
        _field(row, "prompt", str),
        _field(row, "response", str),
        _field(row, "is_safe", bool),
        names,
        categories,
    )


def beavertails_v(row: Mapping[str, Any]) -> Iterator[Example | Dropped]:
    """Both answers of a preference row, without the image: harm alone.

    The row's category is the question's, so it does not say which harm an answer does. The rates
    of harmlessness (-3 to 3) are no severities: a negative one is unsafe, and no more is read.
    ``LabelError`` names a field that is missing or of another type.
    """
    question = _field(row, "question", str)
    name = _field(row, "category", str)
    if name not in BEAVERTAILS_V:
        raise LabelError(f"category is {name!r}, which is not one of the {len(BEAVERTAILS_V)}")
    for number in (1, 2):
        response = _field(row, f"response_{number}", str)
        word = _field(row, f"is_response_{number}_safe", str)
        if word not in ("yes", "no"):
            raise LabelError(f"is_response_{number}_safe is {word!r}, not 'yes' or 'no'")
        safe = word == "yes"
        if safe != (_field(row, f"response_{number}_harmless_rate", int) >= 0):
            yield Dropped("safe, but rated harmful" if safe else "unsafe, but rated harmless")
        elif safe:
            yield _answer("beavertails_v", question, response, safe, (), ())
        else:
            yield _answer("beavertails_v", question, response, safe, (name,), None)


def _answer(
    source: Schema,
    prompt: str,
    response: str,
    safe: bool,
    names: tuple[str, ...],
    categories: tuple[str, ...] | None,
    severity: int | None = None,
) -> Example | Dropped:
    """The example, unless it is empty or its harm and its categories contradict each other."""
    if not prompt.strip() or not response.strip():
        return Dropped("empty")
    if safe == bool(names):
        return Dropped("safe, but of a category" if safe else "unsafe, but of no category")
    return Example(
        id=digest(f"{prompt}\n{response}").hex()[:16],
        source=source,
        role="response",
        prompt=prompt,
        response=response,
        unsafe=not safe,
        severity=severity,
        categories=names,
        pku_categories=categories,
    )


def _field(row: Mapping[str, Any], name: str, kind: type[_Value], within: str = "") -> _Value:
    if name not in row:
        raise LabelError(f"{within}{name} is missing")
    value = row[name]
    # Exactly this type: True is an int, too.
    if type(value) is not kind:
        raise LabelError(f"{within}{name} is {type(value).__name__}, not {kind.__name__}")
    return value


def _flagged(row: Mapping[str, Any], name: str, known: Mapping[str, Any]) -> tuple[str, ...]:
    """The categories that are true in the field ``name``, which must hold exactly the known."""
    flags = _field(row, name, dict)
    if unknown := sorted(flags.keys() - known.keys()):
        raise LabelError(f"{name}: {unknown[0]!r} is not one of the {len(known)} categories")
    return tuple(one for one in known if _field(flags, one, bool, f"{name}: "))


def _parquet_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Row numbers from 1 and rows, without the column of images, which nothing here reads."""
    # Only who reads such a file needs it.
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            columns = [name for name in file.schema_arrow.names if name != "image"]
            batches = file.iter_batches(batch_size=1024, columns=columns)
            yield from enumerate((row for batch in batches for row in batch.to_pylist()), 1)
    except (OSError, pyarrow.ArrowException) as error:
        raise LabelError(f"{path} cannot be read: {error}") from error
