"""Streams of ``/v1/completions``: chunks to a whole answer, and the reverse.

Reference: OpenAI API, "The completion object".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from service import chat_stream
from service.errors import UpstreamMalformed
from service.exchange import Annotations


def whole(events: Sequence[str]) -> dict[str, Any]:
    """The answer that all events of a stream add up to, as if it had not been streamed."""
    head: dict[str, Any] = {}
    choices: dict[int, dict[str, Any]] = {}
    for chunk in chat_stream.objects(events):
        for key, value in chunk.items():
            if key != "choices":
                add = chat_stream.later if key in chat_stream.HEAD else chat_stream.joined
                head[key] = add(head.get(key), value)
        for item in chunk["choices"]:
            if not isinstance(item, dict) or type(item.get("index")) is not int:
                raise UpstreamMalformed("a choice in the upstream's stream has no index")
            choice = choices.setdefault(item["index"], {"index": item["index"], "text": ""})
            for key, value in item.items():
                add = chat_stream.later if key in chat_stream.ENDS else chat_stream.joined
                choice[key] = add(choice.get(key), value)
    if not choices:
        raise UpstreamMalformed("the upstream's stream ended without an answer")
    return head | {"choices": [choices[index] for index in sorted(choices)]}


def chunks(body: Mapping[str, Any], shows_usage: bool) -> Iterator[Mapping[str, Any]]:
    """One chunk for each choice; then usage and verdicts, where they were asked for."""
    shared = {key: body.get(key) for key in ("id", "object", "created", "model")}
    if "prompt_filter_results" in body:
        results = body["prompt_filter_results"]
        yield shared | {"choices": [], "prompt_filter_results": results}
    for choice in body["choices"]:
        yield shared | {"choices": [choice]}
    if shows_usage:
        yield shared | {"choices": [], "usage": body.get("usage")}
    if "moderation" in body:
        yield shared | {"choices": [], "moderation": body["moderation"]}


def annotation_chunks(asked: Annotations) -> Iterator[Mapping[str, Any]]:
    """The chunks of a chat's stream, with a choice as it is here."""
    for chunk in chat_stream.annotation_chunks(asked):
        choices = [
            {key: value for key, value in choice.items() if key != "delta"} | {"text": ""}
            for choice in chunk["choices"]
        ]
        yield {**chunk, "object": "text_completion", "choices": choices}
