"""The dialect of OpenAI's ``/v1/chat/completions``, as vLLM serves it.

Reference: OpenAI API, "Create chat completion"; vLLM, ``chat_completion/protocol.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, Final

from models.inputs import Speaker
from service import chat_stream, conversation, extractor, openai_format
from service.chat_stream import TEXT_PARTS
from service.choices_dialect import ChoicesDialect
from service.conversation import Message
from service.errors import BadRequest, UpstreamMalformed
from service.exchange import (
    Annotations,
    Answer,
    Choice,
    Exchange,
    FieldName,
    Refusal,
    Retry,
    StreamReader,
)
from service.extractor import Reader, Scan

SPEAKERS: Final[Mapping[str, Speaker]] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
}
_FIELD_OF_SPEAKER: Final[Mapping[Speaker, FieldName]] = {
    "user": "message",
    "system": "system",
    "tool": "tool_result",
    "assistant": "text",
}
_PART_SCHEMA: Final[Mapping[str, Any]] = {
    "anyOf": [
        {"type": "string"},
        *(
            {
                "type": "object",
                "required": ["type", key],
                "properties": {"type": {"enum": kinds}, key: {"type": "string"}},
            }
            for key, kinds in (
                ("text", ["text", "input_text", "output_text"]),
                ("refusal", ["refusal"]),
                ("thinking", ["thinking"]),
            )
        ),
        {
            "type": "object",
            "properties": {"type": {"type": "string", "not": {"enum": sorted(TEXT_PARTS)}}},
        },
    ]
}
_MESSAGE_WORDS: Final = frozenset({"tool_call_id", "id"})
_CALL_WORDS: Final = frozenset({"id", "type", "index"})
_UNSCANNABLE: Final = ("prompt_embeds", "audio")
_ECHOES: Final = ("prompt_logprobs", "prompt_token_ids", "prompt_text")
"""What an answer repeats of the prompt, which was judged."""


class ChatDialect(ChoicesDialect):
    """See ``Dialect``."""

    name = "chat"
    path = "/v1/chat/completions"
    identity_prefix = "chatcmpl-"
    object_name = "chat.completion"
    schema: Mapping[str, Any] = {
        "type": "object",
        "required": ["model", "messages"],
        "properties": {
            "model": {"type": "string", "minLength": 1},
            "messages": {
                "type": "array",
                "minItems": 1,
                "items": {
                    "type": "object",
                    "required": ["role"],
                    "properties": {
                        "role": {"type": "string", "enum": list(SPEAKERS)},
                        "content": {
                            "anyOf": [
                                {"type": ["string", "null"]},
                                {"type": "array", "items": _PART_SCHEMA},
                            ]
                        },
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
        scan = Scan()
        messages = parse_messages(reader.take("messages"), scan)
        for key in ("tools", "functions"):
            openai_format.definitions(reader, key, scan)
        openai_format.documents(reader, scan)
        openai_format.refuse(reader, scan, _UNSCANNABLE)
        reader.pass_words(openai_format.WORDS)
        reader.rest(scan)
        return Exchange(
            model=head.model,
            stream=head.stream,
            choices=head.choices,
            fields=(*conversation.fields(messages), *conversation.prompt_fields(scan.pieces)),
            body=body,
            unscannable=tuple(scan.unscannable),
            moderation=head.moderation,
            context=conversation.turns(messages),
        )

    def parse_answer(self, exchange: Exchange, body: Mapping[str, Any]) -> Answer:
        """See ``Dialect.parse_answer``."""
        reader = Reader(body)
        around = Scan()
        choices = []
        for position, raw in enumerate(openai_format.choices(reader)):
            message = raw.get("message")
            if not isinstance(message, dict):
                raise UpstreamMalformed(f"choice {position} of the upstream's answer is no message")
            index = openai_format.index(raw, position)
            path = f"choices[{index}]"
            scan = Scan()
            said = _message(message, f"{path}.message", scan)
            openai_format.rest_of_choice(raw, ("message",), path, scan)
            whole = Message("assistant", said.text, tuple(scan.pieces))
            around.unscannable += scan.unscannable
            choices.append(Choice(index, conversation.answer_fields(exchange.context, whole), raw))
        return openai_format.answer(choices, reader, around, body, _ECHOES)

    def parse_stream(self, exchange: Exchange, events: list[str]) -> Answer:
        """See ``Dialect.parse_stream``."""
        return self.parse_answer(exchange, chat_stream.whole(events))

    def reader(self, exchange: Exchange) -> StreamReader:
        """See ``Dialect.reader``."""
        return chat_stream.ChatReader(exchange, partial(self.parse_answer, exchange))

    def retried(self, exchange: Exchange, retry: Retry) -> Mapping[str, Any]:
        """See ``Dialect.retried``: another seed, and the instruction in the system message."""
        body = dict(self.forwarded(exchange) or exchange.body)
        messages = [dict(message) for message in body["messages"]]
        first = messages[0]
        is_system = SPEAKERS[first["role"]] == "system"
        if is_system and isinstance(first.get("content"), str):
            # Many chat templates allow one system message, and only in front.
            first["content"] = f"{first['content']}\n\n{retry.instruction}"
        elif is_system and isinstance(first.get("content"), list):
            first["content"] = [*first["content"], {"type": "text", "text": retry.instruction}]
        else:
            messages.insert(0, {"role": "system", "content": retry.instruction})
        return body | {"messages": messages, "seed": retry.seed, "n": len(retry.choices)}

    def refused_choice(self, exchange: Exchange, index: int, refusal: Refusal) -> Choice:
        """See ``Dialect.refused_choice``.

        A client that asked for structured output parses ``content``: there the refusal stands in
        ``message.refusal``, which its parser survives.
        """
        structured = exchange.body.get("response_format") not in (None, {"type": "text"})
        message = {
            "role": "assistant",
            "content": None if structured else refusal.text,
            "refusal": refusal.text if structured else None,
        }
        body = {
            "index": index,
            "message": message,
            "logprobs": None,
            "finish_reason": refusal.finish_reason,
        }
        return Choice(index, (), body)

    def chunks(self, body: Mapping[str, Any], shows_usage: bool) -> Iterator[Mapping[str, Any]]:
        """See ``ChoicesDialect.chunks``."""
        return chat_stream.chunks(body, shows_usage)

    def annotation_chunks(self, asked: Annotations) -> Iterator[Mapping[str, Any]]:
        """See ``ChoicesDialect.annotation_chunks``."""
        return chat_stream.annotation_chunks(asked)


def parse_messages(value: Any, scan: Scan) -> tuple[Message, ...]:
    """The messages of a chat; ``BadRequest`` names one that is malformed.

    What cannot be scanned in them is noted in ``scan``; their texts stand in the messages.
    """
    if not isinstance(value, list) or not value:
        raise BadRequest("messages must be a list with at least one message", param="messages")
    messages = []
    for number, message in enumerate(value):
        place = f"messages[{number}]"
        if not isinstance(message, dict):
            raise BadRequest(f"{place} must be an object", param=place)
        own = Scan(unscannable=scan.unscannable)
        messages.append(_message(message, place, own))
    return tuple(messages)


def _message(value: Mapping[str, Any], path: str, scan: Scan) -> Message:
    """All that a message says; of an answer's message, ``role`` may be missing."""
    reader = Reader(value, path)
    role = reader.take("role")
    speaker = SPEAKERS.get(role) if isinstance(role, str) else None
    if role is None and not path.startswith("messages"):
        speaker = "assistant"
    if speaker is None:
        allowed = ", ".join(SPEAKERS)
        raise BadRequest(f"{path}.role must be one of: {allowed}", param=f"{path}.role")
    field = _FIELD_OF_SPEAKER[speaker]
    # A model reads a prompt's parts on lines of their own; a client shows an answer's in one run.
    between = "\n" if path.startswith("messages") else ""
    text = _content(reader.take("content"), reader.where("content"), scan, between)
    scan.add(field, reader.where("content"), text)
    if reader.is_done:
        return Message(speaker, text, tuple(scan.pieces))
    for key in ("refusal", "reasoning", "reasoning_content"):
        if value.get(key) is not None:
            name: FieldName = "refusal" if key == "refusal" else "reasoning"
            scan.add(name, reader.where(key), extractor.leaves(reader.take(key)))
    calls = reader.take("tool_calls")
    if calls:
        for number, call in enumerate(calls if isinstance(calls, list) else [calls]):
            place = f"{reader.where('tool_calls')}[{number}]"
            scan.add("tool_call", place, _call(call, place, scan))
    if value.get("function_call") is not None:
        call = {"function": reader.take("function_call")}
        place = reader.where("function_call")
        scan.add("tool_call", place, _call(call, place, scan))
    name_ = value.get("name")
    if isinstance(name_, str) and not extractor.are_words(name_):
        # A sentence where a name should stand is read by the model as its speaker's.
        scan.add(field, reader.where("name"), reader.take("name"))
    reader.refuse(scan, ("audio", "images"))
    reader.pass_words(_MESSAGE_WORDS)
    reader.rest(scan)
    return Message(speaker, text, tuple(scan.pieces))


def _content(content: Any, path: str, scan: Scan, between: str) -> str:
    """The text of a message's content: a string, null, or a list of parts."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise BadRequest(f"{path} must be a string or a list of parts", param=path)
    texts: list[str] = []
    beside: list[str] = []
    for number, part in enumerate(content):
        place = f"{path}[{number}]"
        if isinstance(part, str):
            texts.append(part)
            continue
        if not isinstance(part, dict):
            raise BadRequest(f"{place} must be an object with a type", param=place)
        kind = part.get("type")
        if not isinstance(kind, str) or kind not in TEXT_PARTS:
            scan.unscannable.append(place)
            continue
        key = "text" if kind in ("input_text", "output_text") else kind
        if not isinstance(part.get(key), str):
            raise BadRequest(f"{place}.{key} must be a string", param=f"{place}.{key}")
        texts.append(part[key])
        beside += [extractor.leaves(part[name]) for name in part if name not in ("type", key)]
        beside += [name for name in part if not extractor.are_words(name)]
    return "\n".join([between.join(texts), *filter(None, beside)])


def _call(call: Any, path: str, scan: Scan) -> str:
    """A tool call's name and arguments, and whatever else stands in it."""
    if not isinstance(call, dict):
        return extractor.leaves(call)
    reader = Reader(call, path)
    function = reader.take("function")
    texts = []
    if isinstance(function, dict):
        inner = Reader(function, reader.where("function"))
        texts = [extractor.leaves(inner.take("name")), extractor.arguments(inner.take("arguments"))]
        inner.rest(scan)
    else:
        texts.append(extractor.leaves(function))
    reader.pass_words(_CALL_WORDS)
    reader.rest(scan)
    return "\n".join(text for text in texts if text)
