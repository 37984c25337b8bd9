"""The dialect of Anthropic's ``/v1/messages``, as vLLM serves it.

Reference: Anthropic API, "Create a Message"; vLLM, ``anthropic/protocol.py``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from models.inputs import Speaker
from service import conversation, extractor, messages_stream, openai_format, sse
from service.body import dumps
from service.conversation import Message
from service.errors import BadRequest, SluicegateError, UpstreamMalformed
from service.exchange import Annotations, Answer, Choice, Exchange, FieldName, Refusal, Retry
from service.extractor import Piece, Reader, Scan
from service.messages_reader import MessagesReader
from service.messages_stream import ANSWER_WORDS, BLOCK_WORDS, CALLS, CHOICE_WORDS

SPEAKERS: Final[Mapping[str, Speaker]] = {
    "user": "user",
    "assistant": "assistant",
    "system": "system",
}
_FIELD_OF_SPEAKER: Final[Mapping[Speaker, FieldName]] = {
    "user": "message",
    "system": "system",
    "tool": "tool_result",
    "assistant": "text",
}
_MEDIA: Final = frozenset({"image", "redacted_thinking", "container_upload"})
# In a block that is new to us: what stands for something else, or is encoded.
_OPAQUE_KEYS: Final = frozenset({"source", "data", "file_id", "encrypted_content"})
_ENCODED: Final = re.compile(r"data:.*|[A-Za-z0-9+/_=-]{256,}", re.DOTALL)
# Keys whose strings never reach a model as text.
_WORDS: Final = frozenset(
    {
        "metadata", "tool_choice", "thinking", "service_tier", "stop_sequences", "cache_control",
        "inference_geo", "cache_salt", "mm_payload", "request_id",
    }
)  # fmt: skip
# What is fetched or run elsewhere: servers of tools, files of an earlier run.
_UNSCANNABLE: Final = ("mcp_servers", "container")
_CHOICE_KEYS: Final = ("content", "stop_reason", "stop_sequence")
# Anthropic's word for each status, where it is not the general one.
_ERROR_TYPES: Final[Mapping[int, str]] = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    529: "overloaded_error",
}


_BLOCK_SCHEMAS: Final[list[Mapping[str, Any]]] = [
    {"type": "string"},
    *(
        {
            "type": "object",
            "required": ["type"],
            "properties": {"type": {"enum": [kind]}, kind: {"type": ["string", "null"]}},
        }
        for kind in ("text", "thinking")
    ),
    {
        "type": "object",
        "required": ["type"],
        "properties": {
            "type": {"type": "string", "not": {"pattern": "^(text|thinking)$|tool_result$"}}
        },
    },
]
_RESULT_SCHEMA: Final[Mapping[str, Any]] = {
    "type": "object",
    "required": ["type"],
    "properties": {
        "type": {"enum": ["tool_result"]},
        "content": {
            "anyOf": [
                {"type": ["string", "null"]},
                {"type": "array", "items": {"anyOf": _BLOCK_SCHEMAS}},
            ]
        },
    },
}
_CONTENT_SCHEMA: Final[Mapping[str, Any]] = {
    "anyOf": [
        {"type": ["string", "null"]},
        {"type": "array", "items": {"anyOf": [*_BLOCK_SCHEMAS, _RESULT_SCHEMA]}},
    ]
}


class MessagesDialect:
    """See ``Dialect``."""

    name = "messages"
    path = "/v1/messages"
    keep_alive = sse.encode('{"type": "ping"}', "ping")
    schema: Mapping[str, Any] = {
        "type": "object",
        "required": ["model", "messages", "max_tokens"],
        "properties": {
            "model": {"type": "string", "minLength": 1},
            "max_tokens": {"type": "integer", "minimum": 1},
            "system": _CONTENT_SCHEMA,
            "messages": {
                "type": "array",
                "minItems": 1,
                "items": {
                    "type": "object",
                    "required": ["role"],
                    "properties": {
                        "role": {"type": "string", "enum": list(SPEAKERS)},
                        "content": _CONTENT_SCHEMA,
                    },
                },
            },
            **openai_format.SHARED_SCHEMA,
        },
    }

    def parse(self, body: Mapping[str, Any]) -> Exchange:
        """See ``Dialect.parse``."""
        reader = Reader(body)
        head = openai_format.head(reader)
        most = reader.take("max_tokens")
        if type(most) is not int or most < 1:
            raise BadRequest("max_tokens must be a whole number from 1", param="max_tokens")
        scan = Scan()
        messages = _conversation(reader, scan)
        openai_format.definitions(reader, "tools", scan)
        _output_config(reader, scan)
        openai_format.refuse(reader, scan, _UNSCANNABLE)
        reader.pass_words(_WORDS)
        reader.rest(scan)
        return Exchange(
            model=head.model,
            stream=head.stream,
            choices=1,
            fields=(*conversation.fields(messages), *conversation.prompt_fields(scan.pieces)),
            body=body,
            unscannable=tuple(scan.unscannable),
            moderation=head.moderation,
        )

    def parse_answer(self, exchange: Exchange, body: Mapping[str, Any]) -> Answer:
        """See ``Dialect.parse_answer``. There is one choice: the message."""
        if not isinstance(body.get("content"), list):
            raise UpstreamMalformed("the upstream's answer has no list of content blocks")
        context = conversation.turns(_conversation(Reader(exchange.body), Scan()))
        reader = Reader(body)
        scan = Scan()
        content = _Content("assistant", scan)
        content.read(reader.take("content"), "content")
        reader.pass_words(ANSWER_WORDS | CHOICE_WORDS)
        reader.rest(scan)
        pieces = tuple(piece for one in content.messages() for piece in one.pieces)
        fields = conversation.answer_fields(context, Message("assistant", "", pieces))
        choice = Choice(0, fields, {key: body.get(key) for key in _CHOICE_KEYS})
        usage = body.get("usage")
        usage = usage if isinstance(usage, dict) else {}
        # Those that came from a cache are counted apart.
        read = ("input_tokens", "cache_read_input_tokens", "cache_creation_input_tokens")
        return Answer(
            (choice,),
            body,
            sum(openai_format.count(usage.get(key)) for key in read),
            openai_format.count(usage.get("output_tokens")),
            tuple(scan.unscannable),
        )

    def parse_stream(self, exchange: Exchange, events: list[str]) -> Answer:
        """See ``Dialect.parse_stream``."""
        return self.parse_answer(exchange, messages_stream.whole(events))

    def forwarded(self, exchange: Exchange) -> Mapping[str, Any] | None:
        """See ``Dialect.forwarded``: only ``moderation``, which is for us, is taken out."""
        return openai_format.without_moderation(exchange.body)

    def retried(self, exchange: Exchange, retry: Retry) -> Mapping[str, Any]:
        """See ``Dialect.retried``: the instruction in ``system``; this format has no seed."""
        body = self.forwarded(exchange) or exchange.body
        system = body.get("system")
        # Blocks of a system prompt are joined as they are, hence the blank line.
        further = f"\n\n{retry.instruction}" if system else retry.instruction
        if isinstance(system, list):
            return {**body, "system": [*system, {"type": "text", "text": further}]}
        return {**body, "system": f"{system or ''}{further}"}

    def refused(self, exchange: Exchange, identity: str, created: int, refusal: Refusal) -> Answer:
        """See ``Dialect.refused``."""
        choice = self.refused_choice(exchange, 0, refusal)
        body = {
            "id": f"msg_{identity}",
            "type": "message",
            "role": "assistant",
            "model": exchange.model,
            **choice.body,
            "usage": {"input_tokens": 0, "output_tokens": 0},
        }
        return Answer((choice,), body)

    def refused_choice(self, exchange: Exchange, index: int, refusal: Refusal) -> Choice:
        """See ``Dialect.refused_choice``.

        A client that asked for structured output parses every text: there the refusal stands in
        ``stop_details``, which its parser survives.
        """
        if _is_structured(exchange.body):
            details = {"type": "refusal", "category": None, "explanation": refusal.text}
            refused: dict[str, Any] = {
                "content": [],
                "stop_reason": "refusal",
                "stop_sequence": None,
            }
            return Choice(index, (), {**refused, "stop_details": details})
        is_end = refusal.finish_reason == "stop"
        body = {
            "content": [{"type": "text", "text": refusal.text}],
            "stop_reason": "end_turn" if is_end else "refusal",
            "stop_sequence": None,
        }
        return Choice(index, (), body)

    def renumbered(self, choice: Choice, index: int) -> Choice:
        """See ``Dialect.renumbered``. The number stands nowhere on the wire."""
        return Choice(index, choice.fields, choice.body)

    def assembled(self, answer: Answer, choices: tuple[Choice, ...]) -> Mapping[str, Any]:
        """See ``Dialect.assembled``.

        Of the message around them only identifiers are kept: the rest was judged with a choice
        that may be another.
        """
        (choice,) = choices
        kept = {key: answer.body[key] for key in answer.body if key in ANSWER_WORDS}
        kept = {key: value for key, value in kept.items() if extractor.are_words(value)}
        kept |= {"type": "message", "role": "assistant"}
        kept["usage"] = kept.get("usage") or {"input_tokens": 0, "output_tokens": 0}
        return {**kept, **choice.body}

    def annotated(self, body: Mapping[str, Any], asked: Annotations) -> Mapping[str, Any]:
        """See ``Dialect.annotated``."""
        return {**body, **messages_stream.verdicts(asked)}

    def annotated_stream(self, raw: bytes, asked: Annotations) -> bytes:
        """See ``Dialect.annotated_stream``: an event before ``message_stop``, without text."""
        return messages_stream.annotated(raw, asked)

    def streamed(self, exchange: Exchange, body: Mapping[str, Any]) -> bytes:
        """See ``Dialect.streamed``."""
        return messages_stream.encoded(messages_stream.events(body))

    def reader(self, exchange: Exchange) -> MessagesReader:
        """See ``Dialect.reader``."""
        return MessagesReader(exchange, self.parse_answer)

    def error_event(self, error: SluicegateError, identity: str) -> bytes:
        """See ``Dialect.error_event``."""
        return sse.encode(dumps(self.error(error, identity)), "error")

    def error(self, error: SluicegateError, identity: str) -> Mapping[str, Any]:
        """See ``Dialect.error``. Our own keys stand beside Anthropic's."""
        general = "api_error" if error.status >= 500 else "invalid_request_error"
        kind = _ERROR_TYPES.get(error.status, general)
        return {
            "type": "error",
            "error": {**error.body()["error"], "type": kind},
            "request_id": identity,
        }


class _Content:
    """The content of a message, or of a tool's result: what it says, and the messages it makes.

    Results of tools stand inside a user's message, and are no words of the user's: each becomes a
    message of its own, in front, where vLLM puts it too.
    """

    def __init__(self, speaker: Speaker, scan: Scan) -> None:
        self._speaker = speaker
        self._scan = scan
        self._path = ""
        self._texts: list[str] = []
        self._thoughts: list[str] = []
        self._results: list[Message] = []

    def read(self, value: Any, path: str) -> None:
        """Reads a string, null, a block, or a list of blocks."""
        self._path = path
        if value is None or isinstance(value, str):
            self._texts.append(value or "")
        elif isinstance(value, dict):
            self._block(value, path)
        elif isinstance(value, list):
            for number, block in enumerate(value):
                self._block(block, f"{path}[{number}]")
        else:
            raise BadRequest(f"{path} must be a string or a list of blocks", param=path)

    def messages(self) -> list[Message]:
        """The results of tools, and then the message itself."""
        # vLLM joins system blocks and thoughts as they are, texts by lines.
        text = ("" if self._speaker == "system" else "\n").join(self._texts)
        own = Scan()
        own.add(_FIELD_OF_SPEAKER[self._speaker], self._path, text)
        own.add("reasoning", self._path, "".join(self._thoughts))
        pieces: Sequence[Piece] = (*own.pieces, *self._scan.pieces)
        if self._results and not pieces and self._speaker == "user":
            return self._results
        return [*self._results, Message(self._speaker, text, tuple(pieces))]

    def _block(self, block: Any, path: str) -> None:
        if isinstance(block, str):
            self._texts.append(block)
            return
        kind = block.get("type") if isinstance(block, dict) else None
        if not isinstance(kind, str):
            raise BadRequest(f"{path} must be an object with a type", param=path)
        reader = Reader(block, path)
        reader.pass_words(BLOCK_WORDS)
        if kind in ("text", "thinking"):
            said = reader.take(kind)
            if not isinstance(said, str | None):
                raise BadRequest(f"{path}.{kind} must be a string", param=f"{path}.{kind}")
            (self._texts if kind == "text" else self._thoughts).append(said or "")
        elif kind in CALLS:
            self._call(reader)
        elif kind.endswith("tool_result"):
            inner = _Content("tool", Scan(unscannable=self._scan.unscannable))
            inner.read(reader.take("content"), reader.where("content"))
            self._results += inner.messages()
        elif kind == "document":
            self._document(reader)
        elif kind == "search_result" and not _is_opaque(block.get("content")):
            keys = ("title", "source", "content")
            self._scan.add("document", path, extractor.leaves([reader.take(key) for key in keys]))
        elif kind in ("tool_addition", "tool_removal") and isinstance(block.get("tool"), dict):
            tool = Reader(reader.take("tool"), reader.where("tool"))
            definition = extractor.definition(tool.take("definition"))
            self._scan.add("tool_definition", tool.where("definition"), definition)
            tool.pass_words(frozenset({"type"}))
            tool.rest(self._scan)
        elif kind in _MEDIA or _is_opaque(block):
            self._scan.unscannable.append(path)
            return
        reader.rest(self._scan)

    def _call(self, reader: Reader) -> None:
        given = reader.take("input")
        said = (extractor.leaves(reader.take("name")), extractor.arguments(given))
        self._scan.add("tool_call", reader.path, "\n".join(text for text in said if text))
        if isinstance(given, str):
            # JSON that was cut, or that holds a key twice, is judged as it stands as well.
            self._scan.add("tool_call", reader.where("input"), given)

    def _document(self, reader: Reader) -> None:
        """A text, or blocks of its own; a file, an address or bytes cannot be scanned."""
        where = reader.where("source")
        source = reader.take("source")
        kind = source.get("type") if isinstance(source, dict) else None
        key = {"text": "data", "content": "content"}.get(kind) if isinstance(kind, str) else None
        if key is None or _is_opaque(source.get("content")):
            self._scan.unscannable.append(where)
            return
        inner = Reader(source, where)
        self._scan.add("document", where, extractor.leaves(inner.take(key)))
        inner.pass_words(frozenset({"type", "media_type"}))
        inner.rest(self._scan)


def _is_opaque(value: Any) -> bool:
    """Whether something in ``value`` is encoded, or stands for what is elsewhere."""
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, dict):
            kind = item.get("type")
            if item.keys() & _OPAQUE_KEYS or (isinstance(kind, str) and kind in _MEDIA):
                return True
            stack.extend(item.values())
        elif isinstance(item, list):
            stack.extend(item)
        elif isinstance(item, str) and _ENCODED.fullmatch(item):
            return True
    return False


def _conversation(reader: Reader, scan: Scan) -> tuple[Message, ...]:
    """The system prompt and the messages; ``BadRequest`` names a part that is malformed.

    What cannot be scanned in them is noted in ``scan``; their texts stand in the messages.
    """
    system = _Content("system", Scan(unscannable=scan.unscannable))
    system.read(reader.take("system"), "system")
    found = system.messages()
    value = reader.take("messages")
    if not isinstance(value, list) or not value:
        raise BadRequest("messages must be a list with at least one message", param="messages")
    for number, message in enumerate(value):
        place = f"messages[{number}]"
        if not isinstance(message, dict):
            raise BadRequest(f"{place} must be an object", param=place)
        inner = Reader(message, place)
        role = inner.take("role")
        speaker = SPEAKERS.get(role) if isinstance(role, str) else None
        if speaker is None:
            allowed = ", ".join(SPEAKERS)
            raise BadRequest(f"{place}.role must be one of: {allowed}", param=f"{place}.role")
        own = Scan(unscannable=scan.unscannable)
        content = _Content(speaker, own)
        content.read(inner.take("content"), inner.where("content"))
        inner.rest(own)
        found += content.messages()
    return tuple(found)


def _output_config(reader: Reader, scan: Scan) -> None:
    """Takes what is said of the output: a schema is read as a tool's definition is."""
    value = reader.take("output_config")
    if not isinstance(value, dict):
        scan.add("other", "output_config", extractor.leaves(value))
        return
    inner = Reader(value, "output_config")
    scan.add("other", inner.where("format"), extractor.definition(inner.take("format")))
    inner.pass_words(frozenset({"effort"}))
    inner.rest(scan)


def _is_structured(body: Mapping[str, Any]) -> bool:
    config = body.get("output_config")
    asked = config.get("format") if isinstance(config, dict) else None
    return bool(asked or body.get("output_format"))
