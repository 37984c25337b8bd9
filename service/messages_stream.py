"""Streams of ``/v1/messages``: events to a whole message, and the reverse.

Reference: Anthropic API, "Streaming messages"; vLLM, ``anthropic/serving.py``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

from service import extractor, openai_format, sse, verdict_shapes
from service.body import dumps, parse_object
from service.chunks import joined, later
from service.errors import BadRequest, UpstreamMalformed
from service.exchange import Annotations

ANNOTATIONS: Final = ("moderation", "prompt_filter_results", "content_filter_results")
"""Keys of ours beside a message; in a stream they come in an event of their own."""

CALLS: Final = frozenset({"tool_use", "server_tool_use", "mcp_tool_use"})
BLOCK_WORDS: Final = frozenset({"type", "id", "tool_use_id", "cache_control", "signature"})
ANSWER_WORDS: Final = frozenset({"id", "type", "role", "model", "usage"})
CHOICE_WORDS: Final = frozenset({"stop_reason", "stop_sequence"})
_DONE: Final = "[DONE]"
_END_KEYS: Final = ("stop_reason", "stop_sequence", "stop_details")
_NO_USAGE: Final[Mapping[str, int]] = {"input_tokens": 0, "output_tokens": 0}
# What each event says; whatever else stands in it is kept apart, to be judged.
_KNOWN: Final[Mapping[str, frozenset[str]]] = {
    "message_start": frozenset({"type", "message"}),
    "content_block_start": frozenset({"type", "index", "content_block"}),
    "content_block_delta": frozenset({"type", "index", "delta"}),
    "content_block_stop": frozenset({"type", "index"}),
    "message_delta": frozenset({"type", "delta", "usage"}),
    "message_stop": frozenset({"type"}),
    "ping": frozenset({"type"}),
}


def whole(events: Sequence[str]) -> dict[str, Any]:
    """The message that all events of a stream add up to, as if it had not been streamed.

    What a client may read beside the message, in events or keys that are new to us, stands in a
    list under ``events``.
    """
    assembly = Assembly()
    for data in events:
        assembly.add(data)
    return assembly.whole()


def events(message: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The events of a whole message: each block starts empty, is filled at once, and stops."""
    usage = message.get("usage") or _NO_USAGE
    # Clients read all of these from the first event, and the end of them again from the last.
    start = {key: value for key, value in message.items() if key not in ANNOTATIONS}
    start |= {"content": [], "stop_reason": None, "stop_sequence": None, "usage": usage}
    start.pop("stop_details", None)
    yield {"type": "message_start", "message": start}
    for index, block in enumerate(message["content"]):
        empty, deltas = _parts(block)
        yield {"type": "content_block_start", "index": index, "content_block": empty}
        for delta in deltas:
            yield {"type": "content_block_delta", "index": index, "delta": delta}
        yield {"type": "content_block_stop", "index": index}
    end = {key: message[key] for key in _END_KEYS if key in message}
    yield {"type": "message_delta", "delta": end, "usage": usage}
    if shown := {key: message[key] for key in ANNOTATIONS if key in message}:
        yield {"type": "moderation", **shown}
    yield {"type": "message_stop"}


def encoded(said: Iterable[Mapping[str, Any]]) -> bytes:
    """Events as bytes, each with its type in front, which clients go by."""
    return b"".join(sse.encode(dumps(event), event["type"]) for event in said)


def verdicts(asked: Annotations) -> Mapping[str, Any]:
    """The verdicts that were asked for, by their keys beside a message."""
    shown: dict[str, Any] = {}
    if asked.openai:
        shown["moderation"] = verdict_shapes.moderation(asked)
    if asked.azure:
        shown["prompt_filter_results"] = verdict_shapes.prompt_filter_results(asked)
        shown["content_filter_results"] = verdict_shapes.choice_filter_results(asked, 0)
    return shown


def annotated(raw: bytes, asked: Annotations) -> bytes:
    """A stream that is passed as it came, with the verdicts before its end."""
    shown = verdicts(asked)
    if not shown:
        return raw
    parser = sse.EventParser()
    came = [*parser.feed(raw), *parser.finish()]
    event = encoded([{"type": "moderation", **shown}])
    for number in reversed(range(len(came))):
        if _is_stop(came[number].data):
            before = b"".join(one.raw for one in came[:number])
            return before + event + b"".join(one.raw for one in came[number:])
    return raw


class Assembly:
    """A message on its way, to which the events of its stream are added by their data."""

    def __init__(self) -> None:
        self._message: dict[str, Any] | None = None
        self._blocks: list[_Block] = []
        self._beside: list[Any] = []
        self._has_reason = False
        self._has_ended = False
        self._is_over = False

    def add(self, data: str) -> dict[str, Any] | None:
        """Adds an event, and gives it; None for a ``[DONE]`` behind the end, as vLLM's other routes
        send it. Raises ``UpstreamMalformed`` where a message cannot go on with it.
        """
        if data == _DONE and self._has_ended and not self._is_over:
            self._is_over = True
            return None
        event = _parsed(data)
        if self._is_over or (self._has_ended and event != {"type": "ping"}):
            raise UpstreamMalformed("the upstream's stream goes on behind its end")
        kind = event["type"]
        if left := beside(event):
            self._beside.append(left)
        if kind == "message_start":
            if self._message is not None:
                raise UpstreamMalformed("a message in the upstream's stream starts twice")
            self._message = _started(event.get("message"))
        elif kind == "message_stop":
            if self._message is None:
                raise UpstreamMalformed("the upstream's stream does not start with a message")
            self._has_ended = True
        elif kind != "ping" and kind in _KNOWN:
            self._grow(event)
        return event

    def whole(self) -> dict[str, Any]:
        """All of it; ``UpstreamMalformed`` where it has not come to its end."""
        if self._message is None or not self._has_ended:
            raise UpstreamMalformed("the upstream's stream ended before it was complete: try again")
        message = self._message | {"content": [block.whole() for block in self._blocks]}
        if self._beside:
            message["events"] = [*self._beside, *_listed(message.get("events"))]
        return message

    def block(self, index: int) -> Mapping[str, Any]:
        """The block of this number, as far as it came."""
        return self._blocks[index].so_far

    @property
    def output_tokens(self) -> int:
        """The count of them that was heard last."""
        usage = (self._message or {}).get("usage")
        return openai_format.count(usage.get("output_tokens") if isinstance(usage, dict) else None)

    def _grow(self, event: Mapping[str, Any]) -> None:
        kind = event["type"]
        if self._message is None:
            raise UpstreamMalformed("the upstream's stream does not start with a message")
        if kind == "message_delta":
            _end(self._message, event)
            self._has_reason = self._has_reason or reason(event) is not None
            return
        if kind != "content_block_stop" and self._has_reason:
            raise UpstreamMalformed("a message in the upstream's stream goes on behind its end")
        index = event.get("index")
        if kind == "content_block_start":
            # A truth value equals a number.
            if type(index) is not int or index != len(self._blocks):
                raise UpstreamMalformed("a block in the upstream's stream is out of order")
            self._blocks.append(_Block(event.get("content_block")))
            return
        if type(index) is not int or not 0 <= index < len(self._blocks):
            raise UpstreamMalformed("an event of the upstream's stream belongs to no block")
        if kind == "content_block_delta":
            self._blocks[index].add(event.get("delta"))


def beside(event: Mapping[str, Any]) -> dict[str, Any]:
    """What stands in an event beside what its type is known to say."""
    known = _KNOWN.get(event["type"], frozenset())
    return {key: value for key, value in event.items() if key not in known}


def reason(event: Mapping[str, Any]) -> Any:
    """Why a message ended, if a ``message_delta`` says it."""
    delta = event.get("delta")
    return delta.get("stop_reason") if isinstance(delta, dict) else None


class _Block:
    """A content block on its way."""

    __slots__ = ("_json", "_value")

    def __init__(self, value: Any) -> None:
        if not isinstance(value, dict):
            raise UpstreamMalformed("a block in the upstream's stream is not an object")
        self._value = dict(value)
        self._json = ""
        """Of a tool's input: JSON in pieces."""

    def add(self, delta: Any) -> None:
        """Adds a delta; of kinds that are new to us too, so that all of it is judged."""
        if not isinstance(delta, dict) or not extractor.are_words(delta.get("type")):
            raise UpstreamMalformed("a delta in the upstream's stream is not an object")
        value = self._value
        for key, piece in delta.items():
            if key == "type":
                continue
            if piece is None:
                value.setdefault(key, None)
            elif key == "partial_json" and isinstance(piece, str):
                self._json += piece
            elif key == "citation":
                value["citations"] = [*_listed(value.get("citations")), piece]
            elif (
                key != "signature"
                and isinstance(piece, str)
                and isinstance(value.get(key), str | None)
            ):
                value[key] = (value.get(key) or "") + piece
            else:
                value[key] = joined(value.get(key), piece)

    @property
    def so_far(self) -> Mapping[str, Any]:
        """The block but for its input in pieces."""
        return self._value

    def whole(self) -> dict[str, Any]:
        """The block as if it had not been streamed."""
        if not self._json:
            return self._value
        given = self._value.get("input")
        found = _input(self._json)
        return self._value | {"input": [given, found] if given else found}


def _parsed(data: str) -> dict[str, Any]:
    try:
        event = parse_object(data.encode())
    except (BadRequest, UnicodeEncodeError):
        raise UpstreamMalformed("an event of the upstream's stream is not JSON") from None
    kind = event.get("type")
    if not isinstance(kind, str) or not extractor.are_words(kind):
        raise UpstreamMalformed("an event of the upstream's stream has no type")
    if kind == "error":
        raise UpstreamMalformed("the upstream's stream ended with an error: try again")
    return event


def _input(raw: str) -> Any:
    """A tool's input. Text where it is no JSON, which a limit on tokens may have cut."""
    try:
        return json.loads(raw, object_pairs_hook=_unique)
    except (ValueError, RecursionError):
        return raw


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # Which of two values counts is the client's parser's choice, so both have to be judged.
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key stands twice")
    return result


def _started(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict) or value.get("content"):
        raise UpstreamMalformed("the upstream's stream does not start with an empty message")
    return dict(value)


def _end(message: dict[str, Any], event: Mapping[str, Any]) -> None:
    """Adds what the end of a message says: why it ended, and what it cost."""
    delta = event.get("delta")
    if not isinstance(delta, dict | None) or "content" in (delta or {}):
        raise UpstreamMalformed("the end of the upstream's message cannot be read")
    for key, value in (delta or {}).items():
        add = later if key in CHOICE_WORDS else joined
        message[key] = add(message.get(key), value)
    usage, known = event.get("usage"), message.get("usage")
    if isinstance(usage, dict) and isinstance(known, dict):
        message["usage"] = known | {key: later(known.get(key), usage[key]) for key in usage}
    elif usage is not None:
        message["usage"] = later(known, usage)


def _parts(block: Mapping[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A block without what deltas bring, and these deltas."""
    empty = dict(block)
    deltas: list[dict[str, Any]] = []
    for key, kind in (("text", "text_delta"), ("thinking", "thinking_delta")):
        if block.get("type") == key and block.get(key):
            empty[key] = ""
            deltas.append({"type": kind, key: block[key]})
    if block.get("type") == "thinking" and block.get("signature"):
        empty["signature"] = ""
        deltas.append({"type": "signature_delta", "signature": block["signature"]})
    given = block.get("input")
    if given:
        empty["input"] = {}
        partial = given if isinstance(given, str) else dumps(given)
        deltas.append({"type": "input_json_delta", "partial_json": partial})
    return empty, deltas


def _is_stop(data: str) -> bool:
    try:
        event = json.loads(data)
    except ValueError:
        return False
    return isinstance(event, dict) and event.get("type") == "message_stop"


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]
