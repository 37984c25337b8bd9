"""The dialect of OpenAI's ``/v1/embeddings``, as vLLM serves it. What it answers is no text.

Reference: OpenAI API, "Create embeddings"; vLLM, ``pooling/embed/protocol.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Final, NoReturn

from service import chat, conversation, openai_format, verdict_shapes
from service.errors import BadRequest, SluicegateError, UpstreamMalformed
from service.exchange import Annotations, Answer, Choice, Exchange, Field, Refusal, Retry
from service.extractor import Reader, Scan
from service.prompts import PROMPT_SCHEMA, Prompt, parse_prompts, text_fields, token_prompts

_WORDS: Final = openai_format.WORDS | {"embed_dtype", "endianness", "padding"}
_ENCODINGS: Final = ("float", "base64")
"""vLLM has others, which answer with bytes that are no JSON."""
_ANSWER_WORDS: Final = frozenset({"id", "object", "created", "model", "usage"})


class EmbeddingsDialect:
    """See ``Dialect``. An answer has no choices, so that nothing of it is judged or refused."""

    name = "embeddings"
    path = "/v1/embeddings"
    schema: Mapping[str, Any] = {
        "type": "object",
        "required": ["model"],
        "anyOf": [
            {"required": ["input"], "properties": {"input": PROMPT_SCHEMA}},
            {"required": ["messages"], "properties": {"messages": {"type": "array"}}},
        ],
        "properties": {
            "model": {"type": "string", "minLength": 1},
            "input": {"anyOf": [*PROMPT_SCHEMA["anyOf"], {"type": "null"}]},
            "messages": {
                "anyOf": [
                    {"type": "null"},
                    chat.ChatDialect.schema["properties"]["messages"],
                    {
                        "type": "array",
                        "minItems": 1,
                        "items": chat.ChatDialect.schema["properties"]["messages"],
                    },
                ]
            },
            "encoding_format": {"enum": [*_ENCODINGS, None]},
            **openai_format.SHARED_SCHEMA,
            "stream": {"enum": [False, None]},
        },
    }

    def parse(self, body: Mapping[str, Any]) -> Exchange:
        """See ``Dialect.parse``."""
        reader = Reader(body)
        head = openai_format.head(reader)
        if head.stream:
            raise BadRequest("stream must be false: there is nothing to stream", param="stream")
        if body.get("encoding_format") not in (None, *_ENCODINGS):
            raise BadRequest(
                f"encoding_format must be one of: {', '.join(_ENCODINGS)}", param="encoding_format"
            )
        scan = Scan()
        given, messages = reader.take("input"), reader.take("messages")
        prompts: Mapping[str, Prompt] = {}
        if given is not None or messages is None:
            prompts = parse_prompts(given, "input")
        said = tuple(_said(messages, scan)) if messages is not None else ()
        openai_format.definitions(reader, "tools", scan)
        openai_format.documents(reader, scan)
        openai_format.refuse(reader, scan, ("prompt_embeds",))
        reader.pass_words(_WORDS)
        reader.rest(scan)
        return Exchange(
            model=head.model,
            stream=False,
            choices=0,
            fields=(
                *text_fields(prompts),
                *said,
                *conversation.prompt_fields(scan.pieces),
            ),
            body=body,
            unscannable=tuple(scan.unscannable),
            token_prompts=token_prompts(prompts),
            moderation=head.moderation,
        )

    def parse_answer(self, exchange: Exchange, body: Mapping[str, Any]) -> Answer:
        """See ``Dialect.parse_answer``. ``data``, which holds the vectors, is not looked into; a
        text beside it has no place in the format, and no choice to be judged with.
        """
        reader = Reader(body)
        reader.take("data")
        reader.pass_words(_ANSWER_WORDS)
        scan = Scan()
        reader.rest(scan)
        usage = body.get("usage")
        tokens = usage.get("prompt_tokens") if isinstance(usage, dict) else None
        beside = (piece.path for piece in scan.pieces)
        return Answer(
            (), body, openai_format.count(tokens), unscannable=(*scan.unscannable, *beside)
        )

    def parse_stream(self, exchange: Exchange, events: list[str]) -> Answer:
        """See ``Dialect.parse_stream``: an upstream that streams was not asked to."""
        raise UpstreamMalformed("the upstream answered with a stream where vectors were asked for")

    def forwarded(self, exchange: Exchange) -> Mapping[str, Any] | None:
        """See ``Dialect.forwarded``: only ``moderation``, which is for us, is taken out."""
        return openai_format.without_moderation(exchange.body)

    def refused(self, exchange: Exchange, identity: str, created: int, refusal: Refusal) -> None:
        """See ``Dialect.refused``: vectors cannot say no."""
        return

    def annotated(self, body: Mapping[str, Any], asked: Annotations) -> Mapping[str, Any]:
        """See ``Dialect.annotated``: verdicts on the input, as there is no other text."""
        # Without choices it would read as if the input had been blocked.
        asked = replace(asked, choices={0: None})
        shown = dict(body)
        if asked.openai:
            shown["moderation"] = {"input": verdict_shapes.moderation(asked)["input"]}
        if asked.azure:
            shown["prompt_filter_results"] = verdict_shapes.prompt_filter_results(asked)
        return shown

    def error(self, error: SluicegateError, identity: str) -> Mapping[str, Any]:
        """See ``Dialect.error``."""
        return error.body()

    # Without choices the gate never asks for the following.
    keep_alive = b""

    def reader(self, exchange: Exchange) -> NoReturn:
        """Unreachable."""
        raise AssertionError("embeddings are never streamed")

    def error_event(self, error: SluicegateError, identity: str) -> NoReturn:
        """Unreachable."""
        raise AssertionError("embeddings are never streamed")

    def retried(self, exchange: Exchange, retry: Retry) -> NoReturn:
        """Unreachable."""
        raise AssertionError("no choice of embeddings is asked for again")

    def refused_choice(self, exchange: Exchange, index: int, refusal: Refusal) -> NoReturn:
        """Unreachable."""
        raise AssertionError("embeddings have no choices")

    def renumbered(self, choice: Choice, index: int) -> NoReturn:
        """Unreachable."""
        raise AssertionError("embeddings have no choices")

    def assembled(self, answer: Answer, choices: tuple[Choice, ...]) -> NoReturn:
        """Unreachable."""
        raise AssertionError("embeddings have no choices")

    def annotated_stream(self, raw: bytes, asked: Annotations) -> NoReturn:
        """Unreachable."""
        raise AssertionError("embeddings are never streamed")

    def streamed(self, exchange: Exchange, body: Mapping[str, Any]) -> NoReturn:
        """Unreachable."""
        raise AssertionError("embeddings are never streamed")


def _said(value: Any, scan: Scan) -> Iterator[Field]:
    """The fields of one conversation, or of a list of them; ``BadRequest`` names what is wrong."""
    if not isinstance(value, list) or not value or not all(isinstance(one, list) for one in value):
        yield from conversation.fields(chat.parse_messages(value, scan))
        return
    for number, one in enumerate(value):
        own = Scan()
        for field in conversation.fields(chat.parse_messages(one, own)):
            yield replace(field, path=_within(number, field.path))
        scan.unscannable += [_within(number, path) for path in own.unscannable]


def _within(number: int, path: str) -> str:
    """``messages[0].content`` of a conversation, as a path from the body."""
    return f"messages[{number}]{path.removeprefix('messages')}"
