"""Reads a stream of ``/v1/messages`` event by event, and can end it before its end.

Reference: Anthropic API, "Streaming messages", "Handling stop reasons" (``refusal``).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Final

from service import extractor
from service.body import dumps
from service.errors import UpstreamMalformed
from service.exchange import Answer, Choice, Exchange, FieldName, Heard, Said
from service.extractor import Reader, Scan
from service.messages_stream import (
    ANSWER_WORDS,
    BLOCK_WORDS,
    CALLS,
    CHOICE_WORDS,
    Assembly,
    beside,
    encoded,
    reason,
)
from service.sse import Event

_ALL: Final = frozenset({0})
"""There is one choice: the message."""
_MESSAGE_WORDS: Final = ANSWER_WORDS | CHOICE_WORDS
_RUNNING: Final[Mapping[str, FieldName]] = {"text": "text", "thinking": "reasoning"}
"""Kinds of blocks that one text runs through, under a key of the same name."""
_NO_TURNS: Final[Mapping[str, Any]] = {"messages": [{"role": "user", "content": ""}]}


class MessagesReader:
    """See ``StreamReader``. ``parse_answer`` is the dialect's, for whole messages and blocks."""

    def __init__(
        self, exchange: Exchange, parse_answer: Callable[[Exchange, Mapping[str, Any]], Answer]
    ) -> None:
        self._exchange = exchange
        # For a block by itself: what it answers is not looked at.
        self._no_turns = replace(exchange, body=_NO_TURNS)
        self._parse_answer = parse_answer
        self._assembly = Assembly()
        self._last: dict[str, int] = {}
        """The newest block of each running text."""
        self._apart: set[int] = set()
        """Blocks whose text came after that of a later block."""
        self._has_begun = False
        self._open: list[int] = []
        """Blocks that are open at the client."""
        self._has_reason = False
        self._has_ended = False

    def hear(self, event: Event) -> Heard:
        """See ``StreamReader.hear``."""
        # Clients go by the type in front, some of them even where no data follows it.
        if not event.data and event.event in (None, "ping"):
            return Heard()
        said = self._assembly.add(event.data)
        if said is None:
            if not extractor.are_words(event.event):
                raise UpstreamMalformed("an event of the upstream's stream has no type")
            return Heard(choices=_ALL, ends=_ALL)
        kind = said["type"]
        if event.event not in (None, kind):
            raise UpstreamMalformed("an event of the upstream's stream has two types")
        found = _Found()
        left = beside(said)
        # Of an event that is new to us, the type was seen to be a word.
        found.rest({key: left[key] for key in left if key != "type"}, "events")
        if kind == "message_start":
            # Its content was seen to be empty.
            message = {key: said["message"][key] for key in said["message"] if key != "content"}
            found.rest(message, "", _MESSAGE_WORDS)
        elif kind == "message_delta":
            found.rest(said.get("delta") or {}, "", _MESSAGE_WORDS)
            found.rest({"usage": said.get("usage")}, "", _MESSAGE_WORDS)
        elif kind == "content_block_start":
            self._hear_block(said["index"], said["content_block"], found)
        elif kind == "content_block_delta":
            self._hear_delta(said["index"], said["delta"], found)
        is_last = kind == "message_stop"
        is_end = is_last or (kind == "message_delta" and reason(said) is not None)
        # A ping is of the message too: behind one that was cut, nothing follows.
        ends = _ALL if is_end else frozenset[int]()
        return Heard(tuple(found.said), _ALL, ends, tuple(found.unscannable), is_last)

    def answer(self) -> Answer:
        """See ``StreamReader.answer``."""
        return self._parse_answer(self._exchange, self._assembly.whole())

    def without(self, event: Event, choices: frozenset[int]) -> bytes:
        """See ``StreamReader.without``: the whole stream is of one choice."""
        return b"" if 0 in choices else event.raw

    def sent(self, event: Event) -> None:
        """See ``StreamReader.sent``."""
        if not event.data or self._has_ended:
            return
        said = json.loads(event.data)
        kind = said["type"]
        if kind == "message_start":
            self._has_begun = True
        elif kind == "content_block_start":
            self._open.append(said["index"])
        elif kind == "content_block_stop" and said["index"] in self._open:
            self._open.remove(said["index"])
        elif kind == "message_delta":
            self._has_reason = self._has_reason or reason(said) is not None
        elif kind == "message_stop":
            self._has_ended = True

    def cut(self, choice: int) -> bytes:
        """See ``StreamReader.cut``. It ends the stream as well."""
        assert choice == 0
        assert self._has_begun
        return self.end()

    def spoken(self, choice: Choice) -> bytes:
        """See ``StreamReader.spoken``: never asked for."""
        raise AssertionError("a message is the only choice of its stream")

    def kept(self) -> Mapping[str, Any] | None:
        """See ``StreamReader.kept``."""
        return None

    def end(self) -> bytes:
        """See ``StreamReader.end``: as filtered, where no reason was sent. What never began has no
        end.
        """
        if self._has_ended or not self._has_begun:
            return b""
        events: list[Mapping[str, Any]] = [
            {"type": "content_block_stop", "index": index} for index in self._open
        ]
        if not self._has_reason:
            end = {"stop_reason": "refusal", "stop_sequence": None}
            usage = {"output_tokens": self._assembly.output_tokens}
            events.append({"type": "message_delta", "delta": end, "usage": usage})
        self._has_ended = True
        return encoded([*events, {"type": "message_stop"}])

    def _hear_block(self, index: int, block: Mapping[str, Any], found: _Found) -> None:
        """A block as it starts, which may hold all of it already."""
        kind = block.get("type")
        if not isinstance(kind, str):
            raise UpstreamMalformed("a block in the upstream's stream has no type")
        where = f"content[{index}]"
        left = dict(block)
        if kind in _RUNNING:
            self._run(index, kind, left.pop(kind, None), found)
        elif kind in CALLS:
            # Its input follows as JSON in pieces, so that what stands here is said as JSON too.
            name, given = extractor.leaves(left.pop("name", None)), left.pop("input", None)
            for text in (name, dumps(given) if given else ""):
                if text:
                    found.add("tool_call", where, f"{text}\n")
        else:
            answer = self._parse_answer(self._no_turns, {"content": [block]})
            for field in answer.choices[0].fields:
                path = where + field.path.removeprefix("content").removeprefix("[0]")
                found.add(field.name, path, f"{field.judged.text}\n")
            if answer.unscannable:
                found.unscannable.append(where)
            return
        found.rest(left, where, BLOCK_WORDS)

    def _hear_delta(self, index: int, delta: Mapping[str, Any], found: _Found) -> None:
        """What is added to a block; of kinds that are new to us too."""
        kind = self._assembly.block(index)["type"]
        where = f"content[{index}]"
        left = {key: value for key, value in delta.items() if key != "type"}
        if kind in _RUNNING:
            self._run(index, kind, left.pop(kind, None), found)
        elif kind not in CALLS:
            answer = self._parse_answer(self._no_turns, {"content": [{**left, "type": kind}]})
            if answer.unscannable:
                found.unscannable.append(where)
        if isinstance(left.get("partial_json"), str):
            found.add("tool_call", where, left.pop("partial_json"))
        found.rest(left, where, BLOCK_WORDS)

    def _run(self, index: int, kind: str, text: Any, found: _Found) -> None:
        """More of a text that runs through all blocks of its kind, as a client shows them."""
        if not isinstance(text, str | None):
            raise UpstreamMalformed("a text in the upstream's stream is none")
        if not text:
            return
        last = self._last.get(kind, index)
        if index in self._apart:
            found.add(_RUNNING[kind], f"content[{index}].{kind}", text)
        elif index < last:
            # By turns they would tear each other apart: it goes on by itself, from its beginning.
            self._apart.add(index)
            begun = self._assembly.block(index)[kind]
            found.add(_RUNNING[kind], f"content[{index}].{kind}", begun)
        else:
            between = "\n" if kind == "text" and index > last else ""
            found.add(_RUNNING[kind], f"content[].{kind}", between + text)
            self._last[kind] = index


class _Found:
    """What was found in one event."""

    __slots__ = ("said", "unscannable")

    def __init__(self) -> None:
        self.said: list[Said] = []
        self.unscannable: list[str] = []

    def add(self, name: FieldName, track: str, text: str) -> None:
        if text:
            self.said.append(Said(0, name, track, text))

    def rest(self, left: Mapping[str, Any], path: str, words: frozenset[str] = frozenset()) -> None:
        """What is left at ``path``: strings as they come, anything else by lines."""
        for key, value in left.items():
            where = f"{path}.{key}" if path else key
            if key.isidentifier() and isinstance(value, str):
                if key not in words or not extractor.are_words(value):
                    self.add("other", where, value)
                continue
            reader = Reader({key: value}, path)
            reader.pass_words(words)
            scan = Scan()
            reader.rest(scan)
            # A key that is a sentence is no name of a track.
            track = where if extractor.are_words(key) else path
            for piece in scan.pieces:
                self.add("other", track, f"{piece.text}\n")
            self.unscannable += scan.unscannable
