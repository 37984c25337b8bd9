"""What is scannable in a JSON value: what is judged covers what is forwarded.

A dialect takes from an object the keys that it knows, and says of each what field it is. What it
did not take is a field too: ``other``. So a key that is new to us, or that a dialect forgot, is
judged rather than passed over. Passed over are only numbers, truth values, and words (below) under
keys whose values never reach a model as text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from service.body import strings
from service.exchange import FieldName

_WORD: Final = re.compile(r"[\w.:/@+=-]{0,128}", re.ASCII)
"""An identifier: no room for a sentence, as there would be without blanks in Chinese."""

_ESCAPE: Final = re.compile(r"\\(u[0-9a-fA-F]{4}|.)", re.DOTALL)
_ESCAPED: Final = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}

_PLAIN: Final = (bool, int, float, type(None))

# What every schema says of itself; the words between them are what a model reads.
_SCHEMA_WORDS: Final = frozenset(
    {
        "type", "function", "name", "description", "parameters", "input_schema", "properties",
        "required", "strict", "items", "enum", "object", "string", "number", "integer", "boolean",
        "array", "null", "additionalProperties", "anyOf", "allOf", "oneOf", "$ref", "$defs",
        "definitions", "title", "default", "format", "schema", "json_schema", "minimum", "maximum",
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Piece:
    """A text that stands at ``path``."""

    name: FieldName
    path: str
    text: str


@dataclass(slots=True)
class Scan:
    """What was found so far: texts to judge, and paths of what no guard here can read."""

    pieces: list[Piece] = field(default_factory=list)
    unscannable: list[str] = field(default_factory=list)

    def add(self, name: FieldName, path: str, text: str) -> None:
        """A text; nothing where it is blank."""
        if text and not text.isspace():
            self.pieces.append(Piece(name, path, text))


class Reader:
    """Takes an object apart key by key, and remembers what nobody took. A null says nothing."""

    __slots__ = ("_left", "path")

    def __init__(self, value: Mapping[str, Any], path: str = "") -> None:
        self._left = {
            key: inner for key, inner in value.items() if inner is not None or not _is_name(key)
        }
        self.path = path

    @property
    def is_done(self) -> bool:
        """Whether everything was taken."""
        return not self._left

    def take(self, key: str) -> Any:
        """The value of ``key``, which the caller answers for; None where there is none."""
        return self._left.pop(key, None)

    def peek(self, key: str) -> Any:
        """The value of ``key``, which stays to be taken."""
        return self._left.get(key)

    def where(self, key: str) -> str:
        """The path of ``key``."""
        return f"{self.path}.{key}" if self.path else key

    def pass_words(self, keys: frozenset[str]) -> None:
        """Passes over values of ``keys`` that are words; others stay and are scanned."""
        left = self._left
        for key in left.keys() & keys:
            if are_words(left[key]):
                del left[key]

    def refuse(self, scan: Scan, keys: Iterable[str]) -> None:
        """Takes ``keys`` as what cannot be scanned."""
        for key in keys:
            if self._left.pop(key, None) is not None:
                scan.unscannable.append(self.where(key))

    def rest(self, scan: Scan) -> None:
        """Adds what nobody took: strings as ``other``, token ids as what cannot be scanned."""
        texts = []
        for key, value in self._left.items():
            if not _is_name(key) and not _WORD.fullmatch(key):
                texts.append(key)
            if type(value) in _PLAIN:
                continue
            if "token" in key and isinstance(value, list) and _holds_numbers(value):
                scan.unscannable.append(self.where(key))
            if text := leaves(value):
                texts.append(text)
        if texts:
            scan.add("other", self.path, "\n".join(texts))


def leaves(value: Any) -> str:
    """All strings of a JSON value, keys of objects included, one a line."""
    if not value:
        return ""
    if isinstance(value, str):
        return value
    return "\n".join(text for text in strings(value) if text.strip())


def definition(value: Any) -> str:
    """What a tool's definition or a schema says, without the words that all of them hold."""
    return "\n".join(text for text in strings(value) if text not in _SCHEMA_WORDS and text.strip())


def are_words(value: Any) -> bool:
    """Whether no string in ``value`` has room for a sentence."""
    if type(value) in _PLAIN:
        return True
    if isinstance(value, str):
        return _WORD.fullmatch(value) is not None
    return all(_WORD.fullmatch(text) for text in strings(value))


def arguments(raw: Any) -> str:
    """The strings in a tool call's arguments, which are JSON in a string, or should be.

    Parsed where it parses: escapes in the raw text would hide words from the guard.
    """
    if not isinstance(raw, str):
        return leaves(raw)
    try:
        # As pairs: of a key that stands twice both values count, whichever a reader takes.
        parsed = json.loads(raw, object_pairs_hook=_flat)
    except (ValueError, RecursionError):
        return raw
    return leaves(parsed) if isinstance(parsed, list | str) else raw


def _is_name(key: str) -> bool:
    """Whether ``key`` is plainly a word; cheaper than to match it."""
    return key.isascii() and key.isidentifier() and len(key) <= 128


def unescaped(raw: str) -> str:
    """A piece of JSON, with its escapes taken for what they mean."""
    if "\\" not in raw:
        return raw
    text = _ESCAPE.sub(_meaning, raw)
    # Two halves of one character come as two escapes.
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _meaning(match: re.Match[str]) -> str:
    escape = match.group(1)
    return chr(int(escape[1:], 16)) if len(escape) == 5 else _ESCAPED.get(escape, escape)


def _flat(pairs: list[tuple[str, Any]]) -> list[Any]:
    return [part for pair in pairs for part in pair]


def _holds_numbers(value: list[Any]) -> bool:
    return any(
        type(item) is int or (isinstance(item, list) and _holds_numbers(item)) for item in value
    )
