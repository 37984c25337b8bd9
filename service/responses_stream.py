"""Streams of ``/v1/responses``: events to a whole response, and the reverse.

Reference: OpenAI API, "Responses: streaming events".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from service import extractor, sse
from service.body import dumps, parse_object, strings
from service.errors import BadRequest, UpstreamMalformed
from service.extractor import Scan

DONE: Final = "[DONE]"
FINAL: Final = frozenset({"response.completed", "response.incomplete", "response.failed"})
WORDS: Final = frozenset(
    {
        "type", "item_id", "id", "call_id", "status", "role", "phase", "object", "obfuscation",
        "event_id",
    }
)  # fmt: skip
# The same tokens as the text that is judged, one by one.
TOKENS: Final = frozenset({"logprobs", "top_logprobs", "bytes"})
_PLACES: Final = ("item_id", "output_index", "content_index", "summary_index", "command_index")
CIPHERS: Final = frozenset({"encrypted_content", "partial_image_b64"})
_ANNOTATIONS: Final = ("moderation", "prompt_filter_results", "content_filter_results")


@dataclass(frozen=True, slots=True)
class Streamed:
    """The response that ends a stream, and what the events before it said and it does not."""

    response: Mapping[str, Any]
    texts: tuple[str, ...]
    unscannable: tuple[str, ...]

    def scan(self) -> Scan:
        """What stands beside the response."""
        scan = Scan(unscannable=list(self.unscannable))
        for text in self.texts:
            scan.add("text", "stream", text)
        return scan


class Adding:
    """Adds up the events of a stream, one by one; raises ``UpstreamMalformed`` for what is none."""

    def __init__(self) -> None:
        self.final: Mapping[str, Any] | None = None
        self._snapshots: list[Mapping[str, Any]] = []
        self._deltas: dict[tuple[Any, ...], list[str]] = {}
        self._others: dict[str, None] = {}
        self._unscannable: list[str] = []

    def add(self, event: Mapping[str, Any]) -> None:
        """One more event."""
        kind = event["type"]
        if kind == "error":
            raise UpstreamMalformed("the upstream's stream ended with an error: try again")
        event = dict(event)
        if kind in FINAL:
            if self.final is not None:
                raise UpstreamMalformed("the upstream's stream ended twice")
            self.final = event.pop("response", None)
            if not isinstance(self.final, dict):
                raise UpstreamMalformed("the last event of the upstream's stream has no response")
        elif isinstance(event.get("response"), dict):
            self._snapshots.append(event.pop("response"))
        if "audio" in kind and "transcript" not in kind:
            self._unscannable.append(kind)
        elif isinstance(event.get("delta"), str):
            where = (kind, *(_hashable(event.get(key)) for key in _PLACES))
            self._deltas.setdefault(where, []).append(event.pop("delta"))
        self._others |= dict.fromkeys(texts(event, self._unscannable))

    def total(self) -> Streamed:
        """What they add up to; ``UpstreamMalformed`` if the end is missing."""
        final = self.final
        if final is None:
            raise UpstreamMalformed("the upstream's stream ended before it was complete: try again")
        said = [*self._others, *("".join(parts) for parts in self._deltas.values())]
        found = dict.fromkeys(_new(said, final.get("output")))
        unscannable = list(self._unscannable)
        for snapshot in self._snapshots:
            found |= dict.fromkeys(_new(texts(snapshot, unscannable), final))
        # Some may be arguments: what these say is read without their escapes too.
        found |= dict.fromkeys([extractor.arguments(text) for text in found])
        return Streamed(final, tuple(found), tuple(unscannable))


def whole(events: Sequence[str]) -> Streamed:
    """What all events of a stream add up to; ``UpstreamMalformed`` if it is not complete."""
    adding = Adding()
    for data in events:
        if data != DONE:
            adding.add(parse_event(data))
    return adding.total()


def _hashable(place: Any) -> Any:
    return place if isinstance(place, str | int | float | None) else dumps(place)


def parse_event(data: str) -> Mapping[str, Any]:
    """An event's data as JSON; ``UpstreamMalformed`` if it is none or has no type."""
    try:
        # Strictly, as a client might read a key that stands twice in another way.
        event = parse_object(data.encode())
    except BadRequest as error:
        raise UpstreamMalformed(
            f"an event of the upstream's stream cannot be judged: {error.message}"
        ) from None
    if not isinstance(event.get("type"), str):
        raise UpstreamMalformed("an event of the upstream's stream has no type")
    return event


def texts(value: Any, unscannable: list[str], passed: frozenset[str] = TOKENS) -> Iterator[str]:
    """All strings that may say something, but what stands under the keys ``passed``; notes what
    cannot be read in ``unscannable``.
    """
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, list):
            stack.extend(reversed(item))
        elif isinstance(item, dict):
            for key, inner in item.items():
                if not extractor.are_words(key):
                    yield key
                if key in CIPHERS and inner is not None:
                    unscannable.append(key)
                elif key not in passed and not (key in WORDS and extractor.are_words(inner)):
                    stack.append(inner)


def _new(texts: Iterable[str], final: Any) -> Iterator[str]:
    """Those of ``texts`` that do not stand in ``final``."""
    known = list(strings(_without_tokens(final)))
    exact = set(known)
    # NUL stands in no text, so that none is found across the border of two.
    joined = "\x00".join(known)
    for text in texts:
        if text.strip() and text not in exact and text not in joined:
            yield text


def _without_tokens(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_tokens(inner) for k, inner in value.items() if k not in TOKENS}
    return [_without_tokens(inner) for inner in value] if isinstance(value, list) else value


def with_final(raw: bytes, change: Callable[[Mapping[str, Any]], Mapping[str, Any]]) -> bytes:
    """``raw``, a whole stream, with another response in its last event."""
    parser = sse.EventParser()
    shown = []
    for event in (*parser.feed(raw), *parser.finish()):
        value = parse_event(event.data) if event.data and event.data != DONE else {}
        if value.get("type") in FINAL:
            changed = {**value, "response": change(value["response"])}
            shown.append(sse.encode(dumps(changed), event.event))
        else:
            shown.append(event.raw)
    return b"".join(shown)


def encoded(body: Mapping[str, Any]) -> bytes:
    """A whole response as the bytes of a stream."""
    return b"".join(
        sse.encode(dumps({**event, "sequence_number": number}), event["type"])
        for number, event in enumerate(_events(body))
    )


def _events(body: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    opening = {key: value for key, value in body.items() if key not in _ANNOTATIONS} | {
        "status": "in_progress",
        "output": [],
        "usage": None,
        "incomplete_details": None,
        "error": None,
    }
    yield {"type": "response.created", "response": opening}
    yield {"type": "response.in_progress", "response": opening}
    for number, item in enumerate(body["output"]):
        yield from _item_events(number, item)
    status = body.get("status")
    end = status if status in ("incomplete", "failed") else "completed"
    yield {"type": f"response.{end}", "response": body}


def _item_events(number: int, item: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    place = {"item_id": item.get("id") or item.get("call_id") or "", "output_index": number}
    kind = item.get("type")
    empty: Mapping[str, Any] = {}
    inner: list[Mapping[str, Any]] = []
    if kind == "message":
        empty = {"content": []}
        for index, part in enumerate(item.get("content") or ()):
            inner += _part_events(place | {"content_index": index}, part)
    elif kind == "reasoning":
        empty = {key: [] for key in ("summary", "content") if key == "summary" or item.get(key)}
        for index, part in enumerate(item.get("summary") or ()):
            where = place | {"summary_index": index}
            added = {"type": "response.reasoning_summary_part.added", "part": {**part, "text": ""}}
            inner += [added | where, *_text_events("reasoning_summary_text", where, part["text"])]
            inner.append({"type": "response.reasoning_summary_part.done", "part": part} | where)
        for index, part in enumerate(item.get("content") or ()):
            where = place | {"content_index": index}
            inner += _text_events("reasoning_text", where, part["text"])
    elif kind == "function_call":
        empty = {"arguments": ""}
        more = {"name": item.get("name")}
        inner += _text_events(
            "function_call_arguments", place, item.get("arguments") or "", "arguments", more
        )
    elif kind == "custom_tool_call":
        empty = {"input": ""}
        inner += _text_events("custom_tool_call_input", place, item.get("input") or "", "input")
    if inner and item.get("status") is not None:
        empty = {**empty, "status": "in_progress"}
    opening = {**item, **empty} if inner else item
    yield {"type": "response.output_item.added", "output_index": number, "item": opening}
    yield from inner
    yield {"type": "response.output_item.done", "output_index": number, "item": item}


def _part_events(place: Mapping[str, Any], part: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    name = "refusal" if part.get("type") == "refusal" else "text"
    kind = "refusal" if name == "refusal" else "output_text"
    opening = {**part, name: ""} | ({"annotations": []} if "annotations" in part else {})
    extra: Mapping[str, Any] = {"logprobs": []} if name == "text" else {}
    return [
        {"type": "response.content_part.added", "part": opening, **place},
        *_text_events(kind, place, part.get(name) or "", name, more=extra, is_both=True),
        {"type": "response.content_part.done", "part": part, **place},
    ]


def _text_events(
    kind: str,
    place: Mapping[str, Any],
    text: str,
    name: str = "text",
    more: Mapping[str, Any] | None = None,
    is_both: bool = False,
) -> list[Mapping[str, Any]]:
    """A delta with all of a text, and its end; ``more`` stands in the end, or in both."""
    more = more or {}
    delta = {"type": f"response.{kind}.delta", "delta": text, **place, **(more if is_both else {})}
    return [delta, {"type": f"response.{kind}.done", name: text, **place, **more}]
