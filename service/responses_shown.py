"""What a client has of a stream of ``/v1/responses``, and how the stream ends there.

Reference: OpenAI API, "Responses: streaming events".
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from service import sse
from service.body import dumps
from service.exchange import Exchange
from service.responses_stream import FINAL

_LISTS: Final = (("summary", "summary_index"), ("content", "content_index"))
_STEMS: Final[Mapping[str, str]] = {
    "output_text": "output_text",
    "refusal": "refusal",
    "reasoning_text": "reasoning_text",
    "summary_text": "reasoning_summary_text",
}
"""The events of a part's text, by the part's type."""
_PARTS: Final[Mapping[str, tuple[str, str]]] = {
    "response.output_text": ("content", "output_text"),
    "response.refusal": ("content", "refusal"),
    "response.reasoning_text": ("content", "reasoning_text"),
    "response.reasoning_summary_text": ("summary", "summary_text"),
}
"""Where a text event's part stands, and the part's type."""
_RUNNING: Final[Mapping[str, str]] = {
    "response.function_call_arguments": "arguments",
    "response.mcp_call_arguments": "arguments",
    "response.custom_tool_call_input": "input",
    "response.code_interpreter_call_code": "code",
}
# They have no ``incomplete``.
_FAILING: Final = frozenset({"web_search_call", "image_generation_call"})


@dataclass(slots=True)
class _Part:
    """A part of an item. ``opened`` is what kind of event opened it, if one did."""

    body: dict[str, Any]
    texts: list[str]
    opened: str = ""
    is_text_open: bool = True
    is_open: bool = True

    def whole(self) -> dict[str, Any]:
        key = "refusal" if self.body.get("type") == "refusal" else "text"
        if not self.texts:
            return self.body
        return {**self.body, key: "".join(self.texts)}


@dataclass(slots=True)
class _Item:
    """An item of the output. ``running`` are values that came in pieces."""

    body: dict[str, Any]
    is_open: bool = True
    parts: dict[str, dict[int, _Part]] = field(default_factory=dict)
    running: dict[str, list[str]] = field(default_factory=dict)

    def whole(self) -> dict[str, Any]:
        if not self.is_open:
            return self.body
        lists = {
            key: [part.whole() for _, part in sorted(parts.items())]
            for key, parts in self.parts.items()
        }
        kind = self.body.get("type")
        status = {"status": "failed" if kind in _FAILING else "incomplete"}
        return {
            **self.body,
            **lists,
            **{key: "".join(pieces) for key, pieces in self.running.items()},
            **({} if kind == "custom_tool_call" else status),
        }


class Shown:
    """All that was sent of one response, event by event."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._head: Mapping[str, Any] | None = None
        self._items: dict[int, _Item] = {}
        self._number = -1
        self._is_over = False
        self.final: Mapping[str, Any] | None = None
        """The response as it was cut."""

    def add(self, event: Mapping[str, Any]) -> None:
        """One more event was sent."""
        kind = event["type"]
        number = event.get("sequence_number")
        self._number = number if type(number) is int else self._number + 1
        self._is_over |= kind in FINAL
        response = event.get("response")
        if isinstance(response, dict) and self._head is None:
            self._head = response
            output = response.get("output")
            for index, one in enumerate(output if isinstance(output, list) else ()):
                self._items[index] = _Item(one, is_open=False)
        place = event.get("output_index")
        if type(place) is not int:
            return
        item = event.get("item")
        if kind == "response.output_item.added" and isinstance(item, dict):
            self._items[place] = _opened(item)
        elif kind == "response.output_item.done" and isinstance(item, dict):
            self._items[place] = _Item(item, is_open=False)
        elif place in self._items and self._items[place].is_open:
            self._add_to(self._items[place], kind, event)

    def _add_to(self, item: _Item, kind: str, event: Mapping[str, Any]) -> None:
        stem, _, verb = kind.rpartition(".")
        if stem in _RUNNING and verb == "delta" and isinstance(event.get("delta"), str):
            item.running.setdefault(_RUNNING[stem], []).append(event["delta"])
        elif stem in _RUNNING and verb == "done":
            key = _RUNNING[stem]
            if isinstance(event.get(key), str):
                item.running[key] = [event[key]]
        elif stem in _PARTS:
            key, part_kind = _PARTS[stem]
            parts = item.parts.setdefault(key, {})
            place = event.get(f"{key}_index")
            if type(place) is int:
                part = parts.setdefault(place, _part({"type": part_kind}))
                _add_text(part, verb, event)
        elif stem.endswith("_part") and isinstance(event.get("part"), dict):
            key = "summary" if "summary" in stem else "content"
            place = event.get(f"{key}_index")
            if type(place) is int:
                part = _part(event["part"], stem)
                part.is_open = verb != "done"
                item.parts.setdefault(key, {})[place] = part
        elif kind == "response.output_text.annotation.added":
            place = event.get("content_index")
            if type(place) is int and (found := item.parts.get("content", {}).get(place)):
                known = found.body.get("annotations") or []
                found.body = {**found.body, "annotations": [*known, event.get("annotation")]}

    def cut(self, usage: Mapping[str, Any] | None) -> bytes:
        """Ends the stream where it stands; nothing where it has ended."""
        if self._is_over:
            return b""
        self._is_over = True
        return b"".join(
            sse.encode(dumps({**event, "sequence_number": number}), event["type"])
            for number, event in enumerate(self._closing(usage), self._number + 1)
        )

    def _closing(self, usage: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
        head = self._head
        if head is None:
            head = self._blank()
            yield {"type": "response.created", "response": head}
        output = []
        for number, item in sorted(self._items.items()):
            whole = item.whole()
            output.append(whole)
            if item.is_open:
                identity = whole.get("id") or whole.get("call_id") or ""
                for key, index in _LISTS:
                    for place, part in sorted(item.parts.get(key, {}).items()):
                        where = {"item_id": identity, "output_index": number, index: place}
                        yield from self._closed(part, where)
                # A call's arguments are not told to be done: nobody is to carry out half a call.
                yield {"type": "response.output_item.done", "output_index": number, "item": whole}
        response = {
            **head,
            "status": "incomplete",
            "incomplete_details": {"reason": "content_filter"},
            "output": output,
        }
        if usage is not None:
            response["usage"] = usage
        self.final = response
        yield {"type": "response.incomplete", "response": response}

    def _closed(self, part: _Part, where: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
        if not part.is_open:
            return
        whole = part.whole()
        kind = whole.get("type")
        stem = _STEMS.get(kind) if isinstance(kind, str) else None
        key = "refusal" if kind == "refusal" else "text"
        text = whole.get(key) or ""
        # Clients parse a structured text at its end, and fail at half of one.
        is_read = kind != "output_text" or not self._is_structured() or _is_json(text)
        if stem and part.is_text_open and is_read:
            more: Mapping[str, Any] = {"logprobs": []} if kind == "output_text" else {}
            yield {"type": f"response.{stem}.done", key: text, **where, **more}
        if part.opened:
            yield {"type": f"{part.opened}.done", "part": whole, **where}

    def _is_structured(self) -> bool:
        text = self._exchange.body.get("text")
        shape = text.get("format") if isinstance(text, dict) else None
        return isinstance(shape, dict) and shape.get("type") in ("json_schema", "json_object")

    def _blank(self) -> Mapping[str, Any]:
        """The head of a response of which nothing was sent."""
        return {
            "id": f"resp_{secrets.token_hex(16)}",
            "object": "response",
            "created_at": 0,
            "status": "in_progress",
            "error": None,
            "incomplete_details": None,
            "model": self._exchange.model,
            "output": [],
            "parallel_tool_calls": True,
            "tool_choice": "auto",
            "tools": [],
        }


def _opened(item: Mapping[str, Any]) -> _Item:
    """An item that was added: what it holds so far goes on with what follows."""
    opened = _Item(dict(item))
    for key, _ in _LISTS:
        parts = item.get(key)
        if isinstance(parts, list):
            opened.parts[key] = {
                place: _part(part) for place, part in enumerate(parts) if isinstance(part, dict)
            }
    for key in dict.fromkeys(_RUNNING.values()):
        if isinstance(item.get(key), str):
            opened.running[key] = [item[key]]
    return opened


def _part(body: Mapping[str, Any], opened: str = "") -> _Part:
    text = body.get("refusal" if body.get("type") == "refusal" else "text")
    return _Part(dict(body), [text] if isinstance(text, str) else [], opened)


def _add_text(part: _Part, verb: str, event: Mapping[str, Any]) -> None:
    if verb == "delta" and isinstance(event.get("delta"), str):
        part.texts.append(event["delta"])
    elif verb == "done":
        text = event.get("refusal" if part.body.get("type") == "refusal" else "text")
        if isinstance(text, str):
            part.texts = [text]
        part.is_text_open = False


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True
