"""Chunks that differ from the one before in their text alone, read without a parser. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from service.chunks import HEAD, parsed
from service.exchange import Heard, Said
from service.sse import Event

_IS_LITERAL: Final = re.compile(r'[^"\\\x00-\x1f\ud800-\udfff]+').fullmatch
"""Characters that stand for themselves in a string of JSON."""


@dataclass(frozen=True, slots=True)
class PlainChunk:
    """A chunk that says nothing new but a piece of text, which stands between these two.

    Nearly all chunks of a stream are one like the other but for that: they need no parser.
    """

    before: str
    after: str
    said: Said
    choices: frozenset[int]

    @classmethod
    def of(cls, event: Event, chunk: Mapping[str, Any], heard: Heard) -> PlainChunk | None:
        """None where ``event`` says anything else, or what would change what is known so far."""
        if event.event or len(heard.said) != 1 or heard.ends or heard.unscannable:
            return None
        if len(chunk["choices"]) != 1 or not HEAD.issuperset(chunk.keys() - {"choices"}):
            return None
        (said,), (item,) = heard.said, chunk["choices"]
        delta = item.get("delta")
        if not isinstance(delta, dict) or delta.get("content") != said.text or chunk.get("usage"):
            return None
        around = [item[key] for key in item.keys() - {"index", "delta"}]
        beside = [delta[key] for key in delta.keys() - {"content"}]
        if said.name != "text" or any(value is not None for value in (*around, *beside)):
            return None
        for key in ('"content":"', '"content": "'):
            head, found, tail = event.data.partition(f'{key}{said.text}"')
            if found:
                plain = cls(head + key, f'"{tail}', said, heard.choices)
                return plain if plain._reads(chunk) else None
        return None

    def _reads(self, chunk: Mapping[str, Any]) -> bool:
        """Whether another text between the two is another text of the chunk, and all it is."""
        (item,) = chunk["choices"]
        text = f"{self.said.text}?"
        other = item | {"delta": item["delta"] | {"content": text}}
        return parsed(f"{self.before}{text}{self.after}") == {**chunk, "choices": [other]}

    def text(self, event: Event) -> str:
        """The text of another such chunk; empty where ``event`` is none."""
        data, start = event.data, len(self.before)
        end = len(data) - len(self.after)
        if event.event or end <= start:
            return ""
        if not data.startswith(self.before) or not data.endswith(self.after):
            return ""
        text = data[start:end]
        return text if _IS_LITERAL(text) else ""
