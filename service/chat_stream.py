"""Streams of ``/v1/chat/completions``: chunks to a whole answer, and the reverse.

Reference: OpenAI API, "The chat completion chunk object".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

from service import extractor, verdict_shapes
from service.chunk_reader import ChunkReader
from service.chunks import ENDS, Found, Whole, joined, later
from service.errors import UpstreamMalformed
from service.exchange import Annotations, Answer, Exchange

TEXT_PARTS: Final = frozenset({"text", "input_text", "output_text", "refusal", "thinking"})
"""Kinds of parts of a message that are text."""
_REASONING: Final = frozenset({"reasoning", "reasoning_content"})
_DELTA_WORDS: Final = frozenset({"tool_call_id", "id"})
_CALL_WORDS: Final = frozenset({"id", "type", "index"})
_CALL_ENDS: Final = frozenset({"id", "type"})
"""What a chunk says of a tool call once."""


def whole(events: Sequence[str]) -> dict[str, Any]:
    """The answer that all events of a stream add up to, as if it had not been streamed."""
    return _answered(Whole.of(events, _add))


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
        opening = {"role": message.pop("role", "assistant")}
        if not isinstance(message.get("content"), list):
            opening["content"] = ""
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


class ChatReader(ChunkReader):
    """See ``StreamReader``."""

    object_name = "chat.completion.chunk"
    echoes = frozenset({"prompt_logprobs", "prompt_token_ids", "prompt_text"})

    def __init__(
        self, exchange: Exchange, parse_answer: Callable[[Mapping[str, Any]], Answer]
    ) -> None:
        super().__init__(exchange, Whole(_add), lambda body: parse_answer(_answered(body)))
        self._names: dict[str, str] = {}
        """Of each tool call."""

    def _chunks(self, body: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
        return chunks(body, shows_usage=False)

    def _filtered(self, choice: int) -> Mapping[str, Any]:
        return {"index": choice, "delta": {}, "logprobs": None, "finish_reason": "content_filter"}

    def _hear_choice(self, item: Mapping[str, Any], found: Found) -> None:
        index = item["index"]
        path = f"choices[{index}].message"
        start = len(found.said)
        left = {}
        for key, value in (item.get("delta") or {}).items():
            if key == "content":
                _hear_content(index, value, f"{path}.content", found)
            elif key == "refusal":
                found.text(index, "refusal", f"{path}.refusal", extractor.leaves(value))
            elif key in _REASONING:
                found.text(index, "reasoning", f"{path}.{key}", extractor.leaves(value))
            elif key == "tool_calls":
                for call in value or ():
                    place = f"{path}.tool_calls[{call.get('index', 0)}]"
                    self._hear_call(index, call, place, found)
            elif key == "function_call" and value is not None:
                self._hear_call(index, {"function": value}, f"{path}.function_call", found)
            elif key in ("audio", "images") and value is not None:
                found.unscannable.append(f"{path}.{key}")
            elif key == "role":
                if not extractor.are_words(value):
                    raise UpstreamMalformed("a role in the upstream's stream is none")
            elif key not in _DELTA_WORDS or not extractor.are_words(value):
                left[key] = value
        own = "".join(said.text for said in found.said[start:])
        if left:
            found.rest(index, left, path)
        self._hear_beside(item, ("delta",), own, found)

    def _hear_call(self, index: int, call: Mapping[str, Any], path: str, found: Found) -> None:
        """A piece of a tool call: its name in a line, then its arguments as they come."""
        left = {
            key: value
            for key, value in call.items()
            if key != "function" and not (key in _CALL_WORDS and extractor.are_words(value))
        }
        function = call.get("function")
        if isinstance(function, dict):
            name = extractor.leaves(function.get("name"))
            # Some say it again with each piece.
            if name and self._names.get(path) != name:
                self._names[path] = name
                found.text(index, "tool_call", path, f"{name}\n")
            arguments = extractor.leaves(function.get("arguments"))
            found.text(index, "tool_call", path, arguments)
            known = ("name", "arguments")
            inner = {key: value for key, value in function.items() if key not in known}
            found.rest(index, inner, f"{path}.function")
        else:
            found.text(index, "tool_call", path, extractor.leaves(function))
        found.rest(index, left, path)


def _hear_content(index: int, content: Any, path: str, found: Found) -> None:
    """More of a message's content: a string, null, or a list of parts."""
    if content is None or isinstance(content, str):
        found.text(index, "text", path, content or "")
        return
    if not isinstance(content, list):
        raise UpstreamMalformed("the content in the upstream's stream is no text")
    for number, part in enumerate(content):
        place = f"{path}[{number}]"
        if isinstance(part, str):
            found.text(index, "text", path, part)
            continue
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(kind, str) or kind not in TEXT_PARTS:
            found.unscannable.append(place)
            continue
        key = "text" if kind in ("input_text", "output_text") else kind
        if not isinstance(part.get(key), str):
            raise UpstreamMalformed("a part of the content in the upstream's stream is no text")
        found.text(index, "text", path, part[key])
        left = {name: value for name, value in part.items() if name not in ("type", key)}
        found.rest(index, left, place)


def _answered(body: dict[str, Any]) -> dict[str, Any]:
    """What chunks add up to, as the answer that it is."""
    if extractor.are_words(body.get("object")):
        body["object"] = "chat.completion"
    return body


def _add(choices: dict[int, dict[str, Any]], item: Mapping[str, Any]) -> None:
    """Adds a chunk's choice to the message that it belongs to."""
    empty = {"index": item["index"], "message": {"role": "assistant"}, "finish_reason": None}
    choice = choices.setdefault(item["index"], empty)
    delta = item.get("delta")
    if not isinstance(delta, dict | None) or "message" in item:
        raise UpstreamMalformed("a choice in the upstream's stream has no delta")
    for key, value in item.items():
        if key in ("delta", "logprobs"):
            continue
        if value is None:
            choice.setdefault(key, None)
        else:
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
