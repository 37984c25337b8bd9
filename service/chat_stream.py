"""Streams of ``/v1/chat/completions``: chunks to a whole answer, and the reverse.

Reference: OpenAI API, "The chat completion chunk object".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from service import extractor, verdict_shapes
from service.body import parse_object
from service.errors import UpstreamMalformed
from service.exchange import Annotations

_DONE = "[DONE]"
HEAD: Final = frozenset(
    {"id", "object", "created", "model", "usage", "system_fingerprint", "service_tier"}
)
"""What every chunk of a stream says again."""
ENDS: Final = frozenset({"index", "finish_reason", "stop_reason"})
"""What a chunk says of a choice once."""
_CALL_ENDS: Final = frozenset({"id", "type"})
"""What a chunk says of a tool call once."""


def objects(events: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The chunks in the data of a stream's events, which must end with ``[DONE]``.

    Raises ``BadRequest`` for one that is not JSON in one way only.
    """
    if not events or events[-1] != _DONE:
        raise UpstreamMalformed("the upstream's stream ended before it was complete: try again")
    for data in events:
        if data == _DONE:
            continue
        chunk = parse_object(data.encode())
        if not isinstance(chunk.get("choices"), list):
            raise UpstreamMalformed("an event of the upstream's stream is not a chunk")
        yield chunk


def whole(events: Sequence[str]) -> dict[str, Any]:
    """The answer that all events of a stream add up to, as if it had not been streamed."""
    head: dict[str, Any] = {}
    choices: dict[int, dict[str, Any]] = {}
    for chunk in objects(events):
        for key, value in chunk.items():
            if key != "choices":
                add = later if key in HEAD else joined
                head[key] = add(head.get(key), value)
        for item in chunk["choices"]:
            _add(choices, item)
    if not choices:
        raise UpstreamMalformed("the upstream's stream ended without an answer")
    if extractor.are_words(head.get("object")):
        head["object"] = "chat.completion"
    return head | {"choices": [choices[index] for index in sorted(choices)]}


def chunks(body: Mapping[str, Any], shows_usage: bool) -> Iterator[Mapping[str, Any]]:
    """Role, text and end of each choice; then usage and verdicts, where they were asked for."""
    shared = {
        "id": body.get("id"),
        "object": "chat.completion.chunk",
        "created": body.get("created"),
        "model": body.get("model"),
    }
    if "prompt_filter_results" in body:
        results = body["prompt_filter_results"]
        yield shared | {"choices": [], "prompt_filter_results": results}
    for choice in body["choices"]:
        message = {k: v for k, v in choice["message"].items() if v is not None and v != []}
        if "tool_calls" in message:
            message["tool_calls"] = [
                {"index": number, **call} for number, call in enumerate(message["tool_calls"])
            ]
        opening = {"role": message.pop("role", "assistant"), "content": ""}
        index = choice["index"]
        for delta in (opening, message):
            item = {"index": index, "delta": delta, "finish_reason": None}
            yield shared | {"choices": [item]}
        end = {"index": index, "delta": {}, "finish_reason": choice.get("finish_reason")}
        if "content_filter_results" in choice:
            end["content_filter_results"] = choice["content_filter_results"]
        yield shared | {"choices": [end]}
    if shows_usage:
        yield shared | {"choices": [], "usage": body.get("usage")}
    if "moderation" in body:
        yield shared | {"choices": [], "moderation": body["moderation"]}


def annotation_chunks(asked: Annotations) -> Iterator[Mapping[str, Any]]:
    """Verdicts on a stream that was passed as it came, in chunks without text."""
    empty = {"id": "", "object": "chat.completion.chunk", "created": 0, "model": ""}
    if asked.azure:
        yield empty | {
            "choices": [
                {
                    "index": index,
                    "delta": {},
                    "finish_reason": None,
                    "content_filter_results": verdict_shapes.choice_filter_results(asked, index),
                }
                for index in sorted(asked.choices)
            ],
            "prompt_filter_results": verdict_shapes.prompt_filter_results(asked),
        }
    if asked.openai:
        yield empty | {"choices": [], "moderation": verdict_shapes.moderation(asked)}


def joined(old: Any, new: Any) -> Any:
    """A value that comes in parts: texts and lists one behind the other, objects key by key."""
    if isinstance(old, str) and isinstance(new, str):
        return old + new
    if isinstance(old, list) and isinstance(new, list):
        return [*old, *new]
    if isinstance(old, dict) and isinstance(new, dict):
        return old | {key: joined(old.get(key), value) for key, value in new.items()}
    if old is None or new is None or old == new:
        return old if new is None else new
    return [old, new]


def later(old: Any, new: Any) -> Any:
    """What stands under a key that comes again: the later value, or both, so that none of what a
    client reads is lost from what is judged.
    """
    if new is None:
        return old
    return new if old is None or old == new or extractor.are_words(old) else [old, new]


def _add(choices: dict[int, dict[str, Any]], item: Any) -> None:
    """Adds a chunk's choice to the message that it belongs to."""
    if not isinstance(item, dict) or type(item.get("index")) is not int:
        raise UpstreamMalformed("a choice in the upstream's stream has no index")
    empty = {"index": item["index"], "message": {"role": "assistant"}, "finish_reason": None}
    choice = choices.setdefault(item["index"], empty)
    delta = item.get("delta")
    if not isinstance(delta, dict | None) or "message" in item:
        raise UpstreamMalformed("a choice in the upstream's stream has no delta")
    for key, value in item.items():
        if key not in ("delta", "logprobs"):
            add = later if key in ENDS else joined
            choice[key] = add(choice.get(key), value)
    message = choice["message"]
    for key, value in (delta or {}).items():
        if value is None:
            message.setdefault(key, None)
        elif key == "tool_calls":
            message["tool_calls"] = message.get("tool_calls") or []
            _add_calls(message["tool_calls"], value)
        else:
            add = later if key == "role" else joined
            message[key] = add(message.get(key), value)


def _add_calls(calls: list[dict[str, Any]], deltas: Any) -> None:
    if not isinstance(deltas, list):
        raise UpstreamMalformed("the tool calls in the upstream's stream are no list")
    for delta in deltas:
        if not isinstance(delta, dict) or type(delta.get("index", 0)) is not int:
            raise UpstreamMalformed("a tool call in the upstream's stream has no index")
        position = delta.get("index", 0)
        if not 0 <= position <= len(calls):
            raise UpstreamMalformed("a tool call in the upstream's stream is out of order")
        if position == len(calls):
            calls.append({"function": {}})
        call = calls[position]
        function = delta.get("function") or {}
        if not isinstance(function, dict) or not isinstance(function.get("arguments"), str | None):
            raise UpstreamMalformed("a tool call in the upstream's stream is no function's")
        for key, value in delta.items():
            if key != "index":
                add = later if key in _CALL_ENDS else joined
                call[key] = add(call.get(key), value)
