"""The dialect of OpenAI's ``/v1/responses``, as vLLM serves it.

Reference: OpenAI API, "Create a model response"; vLLM, ``responses/protocol.py``.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from service import conversation, extractor, openai_format, responses_stream, sse, verdict_shapes
from service.body import dumps, strings
from service.conversation import Message
from service.errors import BadRequest, SluicegateError, UpstreamMalformed
from service.exchange import Annotations, Answer, Choice, Exchange, Refusal, Retry
from service.extractor import Piece, Reader, Scan
from service.responses_items import ITEM_SCHEMA, parse_item, parse_items
from service.responses_reader import ResponsesReader

_REQUEST_WORDS: Final = openai_format.WORDS | {
    "background", "reasoning", "text", "prompt_cache_retention", "prompt_cache_options",
}  # fmt: skip
_UNSCANNABLE: Final = ("prompt", "conversation", "prompt_embeds")
_UNSCANNABLE_IN_ANSWERS: Final = ("input_messages", "output_messages")
"""vLLM's account of the tokens, under ``enable_response_messages``."""
_BODY_WORDS: Final = frozenset(
    {
        "id", "object", "usage", "service_tier", "system_fingerprint", "incomplete_details",
        "background", "truncation", "previous_response_id", "prompt_cache_key", "user", "metrics",
    }
)  # fmt: skip
_STATUSES: Final = frozenset({"completed", "incomplete", "failed", "cancelled"})
_CHOICE_KEYS: Final = ("output", "status", "incomplete_details", "error")
# What may stand around an answer that another attempt gave. All else told of the one before.
_HEAD_KEYS: Final = frozenset(
    {
        "id", "object", "created_at", "model", "instructions", "metadata", "parallel_tool_calls",
        "temperature", "tool_choice", "tools", "top_p", "background", "max_output_tokens",
        "max_tool_calls", "previous_response_id", "prompt", "reasoning", "service_tier", "text",
        "top_logprobs", "truncation", "usage", "user", "store", "presence_penalty",
        "frequency_penalty",
    }
)  # fmt: skip
_NO_USAGE: Final[Mapping[str, Any]] = {
    "input_tokens": 0,
    "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
    "output_tokens": 0,
    "output_tokens_details": {"reasoning_tokens": 0},
    "total_tokens": 0,
}


class ResponsesDialect:
    """See ``Dialect``. A response is always one choice."""

    name = "responses"
    path = "/v1/responses"
    schema: Mapping[str, Any] = {
        "type": "object",
        "required": ["model", "input"],
        "properties": {
            "model": {"type": "string", "minLength": 1},
            "input": {
                "anyOf": [
                    {"type": "string"},
                    {
                        "type": "array",
                        "minItems": 1,
                        "items": ITEM_SCHEMA,
                    },
                ]
            },
            "instructions": {"type": ["string", "null"]},
            "background": {"enum": [False, None]},
            "previous_response_id": {"type": ["string", "null"]},
            **openai_format.SHARED_SCHEMA,
        },
    }

    def parse(self, body: Mapping[str, Any]) -> Exchange:
        """See ``Dialect.parse``."""
        reader = Reader(body)
        head = openai_format.head(reader)
        if reader.take("background"):
            raise BadRequest(
                "background responses would be read from the upstream unjudged: leave background"
                " out",
                code="background_unsupported",
                param="background",
            )
        if reader.take("previous_response_id") is not None:
            raise BadRequest(
                "previous_response_id is not known here: send the conversation as input",
                code="previous_response_not_found",
                param="previous_response_id",
            )
        scan = Scan()
        messages = parse_items(reader.take("instructions"), reader.take("input"), body, scan)
        said = conversation.fields(messages, "input")
        openai_format.definitions(reader, "tools", scan)
        openai_format.refuse(reader, scan, _UNSCANNABLE)
        reader.pass_words(_REQUEST_WORDS)
        reader.rest(scan)
        return Exchange(
            model=head.model,
            stream=head.stream,
            choices=1,
            fields=(*said, *conversation.prompt_fields(scan.pieces)),
            body=body,
            unscannable=tuple(scan.unscannable),
            moderation=head.moderation,
            context=conversation.turns(messages),
        )

    def parse_answer(self, exchange: Exchange, body: Mapping[str, Any]) -> Answer:
        """See ``Dialect.parse_answer``."""
        return _answer(exchange, body, Scan())

    def parse_stream(self, exchange: Exchange, events: list[str]) -> Answer:
        """See ``Dialect.parse_stream``. Beside the final response, whatever the events before it
        said and it does not say is judged.
        """
        streamed = responses_stream.whole(events)
        return _answer(exchange, streamed.response, streamed.scan())

    def forwarded(self, exchange: Exchange) -> Mapping[str, Any] | None:
        """See ``Dialect.forwarded``: the upstream stores nothing, or it could be read unjudged."""
        changed = openai_format.without_moderation(exchange.body)
        if changed is None and exchange.body.get("store") is False:
            return None
        return {**(changed or exchange.body), "store": False}

    def retried(self, exchange: Exchange, retry: Retry) -> Mapping[str, Any]:
        """See ``Dialect.retried``. The API has no seed, vLLM has: it is sent to who knows it."""
        body = dict(self.forwarded(exchange) or exchange.body)
        body["instructions"] = _instructed(body, retry.instruction)
        if body.get("seed") is not None:
            body["seed"] = retry.seed
        return body

    def refused(self, exchange: Exchange, identity: str, created: int, refusal: Refusal) -> Answer:
        """See ``Dialect.refused``: a complete response, as the clients' types want it."""
        asked = exchange.body
        choice = _refused(exchange, identity, refusal)
        body = {
            "id": f"resp_{identity}",
            "object": "response",
            "created_at": created,
            "error": None,
            "instructions": asked.get("instructions"),
            "model": exchange.model,
            "parallel_tool_calls": _or(asked.get("parallel_tool_calls"), True),
            "tool_choice": _or(asked.get("tool_choice"), "auto"),
            "tools": _or(asked.get("tools"), []),
            "temperature": _or(asked.get("temperature"), 1.0),
            "top_p": _or(asked.get("top_p"), 1.0),
            "usage": _NO_USAGE,
            "metadata": _or(asked.get("metadata"), {}),
        }
        return Answer((choice,), {**body, **choice.body})

    def refused_choice(self, exchange: Exchange, index: int, refusal: Refusal) -> Choice:
        """See ``Dialect.refused_choice``."""
        return _refused(exchange, secrets.token_hex(16), refusal)

    def renumbered(self, choice: Choice, index: int) -> Choice:
        """See ``Dialect.renumbered``: a response does not show its number."""
        return replace(choice, index=index)

    def assembled(self, answer: Answer, choices: tuple[Choice, ...]) -> Mapping[str, Any]:
        """See ``Dialect.assembled``. Of ``answer`` only its head is left, and of that what the
        request said, and identifiers.
        """
        head = {
            key: value
            for key, value in answer.body.items()
            if key in _HEAD_KEYS and key not in answer.own_keys
        }
        return {**head, "error": None, **choices[0].body}

    def annotated(self, body: Mapping[str, Any], asked: Annotations) -> Mapping[str, Any]:
        """See ``Dialect.annotated``."""
        shown = dict(body)
        if asked.openai:
            shown["moderation"] = verdict_shapes.response_moderation(asked)
        if asked.azure:
            shown["prompt_filter_results"] = verdict_shapes.prompt_filter_results(asked)
            shown["content_filter_results"] = verdict_shapes.choice_filter_results(asked, 0)
        return shown

    def annotated_stream(self, raw: bytes, asked: Annotations) -> bytes:
        """See ``Dialect.annotated_stream``: they stand in the response of the last event."""
        return responses_stream.with_final(raw, lambda body: self.annotated(body, asked))

    def streamed(self, exchange: Exchange, body: Mapping[str, Any]) -> bytes:
        """See ``Dialect.streamed``."""
        return responses_stream.encoded(body)

    keep_alive = sse.comment("waiting")

    def reader(self, exchange: Exchange) -> ResponsesReader:
        """See ``Dialect.reader``."""
        return ResponsesReader(exchange, _answer)

    def error_event(self, error: SluicegateError, identity: str) -> bytes:
        """See ``Dialect.error_event``."""
        body = {**error.body()["error"], "type": "error", "sequence_number": 0}
        return sse.encode(dumps(body), "error")

    def error(self, error: SluicegateError, identity: str) -> Mapping[str, Any]:
        """See ``Dialect.error``."""
        return error.body()


def _answer(exchange: Exchange, body: Mapping[str, Any], scan: Scan) -> Answer:
    """The answer in a response; ``scan`` holds what a stream said beside it."""
    reader = Reader(body)
    output = reader.take("output")
    if not isinstance(output, list):
        raise UpstreamMalformed("the upstream's answer has no list of output items")
    status = reader.take("status")
    if not isinstance(status, str) or status not in _STATUSES:
        raise UpstreamMalformed("the upstream answered before its response was complete")
    pieces: list[Piece] = []
    for number, item in enumerate(output):
        own = Scan(unscannable=scan.unscannable)
        pieces += parse_item(item, f"output[{number}]", own, is_answer=True).pieces
    echoes = {
        key
        for key, value in body.items()
        if key in exchange.body and _is_echo(key, value, exchange.body[key])
    }
    # What another attempt was told comes back with its answer.
    told = exchange.instruction and _instructed(exchange.body, exchange.instruction)
    if told and body.get("instructions") == told:
        echoes.add("instructions")
    for key in echoes:
        reader.take(key)
    reader.refuse(scan, _UNSCANNABLE_IN_ANSWERS)
    reader.pass_words(_BODY_WORDS)
    # Where the request has no such key, these are the upstream's defaults.
    reader.pass_words(_REQUEST_WORDS)
    reader.rest(scan)
    said = Message("assistant", "", (*pieces, *scan.pieces))
    choice = Choice(
        0,
        conversation.answer_fields(exchange.context, said),
        {"incomplete_details": None, "error": None}
        | {key: body[key] for key in _CHOICE_KEYS if key in body},
    )
    usage = body.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    return Answer(
        (choice,),
        body,
        openai_format.count(usage.get("input_tokens")),
        openai_format.count(usage.get("output_tokens")),
        tuple(scan.unscannable),
        frozenset(
            key
            for key, value in body.items()
            if key not in echoes and not _is_identifier(key, value)
        ),
    )


def _is_echo(key: str, value: Any, asked: Any) -> bool:
    """Whether ``value`` repeats what the request said under the same key, which was judged.

    An upstream may add defaults to tools and formats: words, and nothing that says anything.
    """
    if value == asked:
        return True
    if key not in ("tools", "text", "tool_choice", "reasoning") or type(value) is not type(asked):
        return False
    said = set(strings(asked))
    return all(text in said or extractor.are_words(text) for text in strings(value))


def _is_identifier(key: str, value: Any) -> bool:
    """Whether ``value`` says nothing, or names something under a key where names belong."""
    if not extractor.leaves(value):
        return True
    names = key == "model" or key in _BODY_WORDS or key in _REQUEST_WORDS
    return names and extractor.are_words(value)


def _refused(exchange: Exchange, identity: str, refusal: Refusal) -> Choice:
    """One refusing message. A client that asked for structured output parses ``output_text``:
    there the refusal is a part of its own, which its parser survives.
    """
    text = exchange.body.get("text")
    shape = text.get("format") if isinstance(text, dict) else None
    is_structured = isinstance(shape, dict) and shape.get("type") in ("json_schema", "json_object")
    is_filtered = refusal.finish_reason == "content_filter"
    part: Mapping[str, Any] = {"type": "output_text", "text": refusal.text, "annotations": []}
    if is_structured:
        part = {"type": "refusal", "refusal": refusal.text}
    message = {
        "id": f"msg_{identity}",
        "type": "message",
        "role": "assistant",
        "status": "completed",
        "content": [part],
    }
    body = {
        "output": [message],
        "status": "incomplete" if is_filtered else "completed",
        "incomplete_details": {"reason": "content_filter"} if is_filtered else None,
        "error": None,
    }
    return Choice(0, (), body)


def _instructed(body: Mapping[str, Any], instruction: str) -> str:
    """The instructions of another attempt."""
    given = body.get("instructions")
    return f"{given}\n\n{instruction}" if given else instruction


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value
