"""The dialect of OpenAI's ``/v1/chat/completions``, as vLLM serves it.

Reference: OpenAI API, "Create chat completion" and "The chat completion chunk object".
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, Final, cast

from models.inputs import GuardInput, Speaker, Turn
from models.taxonomy import Role
from service import extractor, sse
from service.body import dumps
from service.errors import BadRequest, UnsupportedModality, UpstreamMalformed
from service.exchange import Answer, Choice, Exchange, Field, FieldName, Refusal, Retry

SPEAKERS: Final[Mapping[str, Speaker]] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
}
_CONTEXT_TURNS: Final = 8
_MOST_CHOICES: Final = 128

# Keys whose strings never reach the model as text, or are read by name below.
_REQUEST_KEYS: Final = frozenset(
    {
        "model", "messages", "tools", "functions", "documents", "stream", "stream_options", "n",
        "user", "tool_choice", "function_call", "service_tier", "modalities", "store", "metadata",
        "safety_identifier", "prompt_cache_key", "reasoning_effort", "verbosity", "stop",
        "moderation", "request_id", "cache_salt", "logit_bias", "session_id",
    }
)  # fmt: skip
_MESSAGE_KEYS: Final = frozenset(
    {
        "role", "content", "tool_calls", "function_call", "refusal", "reasoning",
        "reasoning_content", "tool_call_id", "id",
    }
)  # fmt: skip
_UNSCANNABLE: Final = ("chat_template", "prompt_embeds")


class ChatDialect:
    """See ``Dialect``."""

    name = "chat"
    path = "/v1/chat/completions"

    def parse(self, body: Mapping[str, Any]) -> Exchange:
        """See ``Dialect.parse``."""
        model = body.get("model")
        if not isinstance(model, str) or not model:
            raise BadRequest("model must be a string that names a model", param="model")
        messages = body.get("messages")
        if not isinstance(messages, list) or not messages:
            raise BadRequest("messages must be a list with at least one message", param="messages")
        stream = body.get("stream")
        if not isinstance(stream, bool | None):
            raise BadRequest("stream must be true or false", param="stream")
        choices = body.get("n")
        if choices is None:
            choices = 1
        if type(choices) is not int or not 1 <= choices <= _MOST_CHOICES:
            raise BadRequest(f"n must be a whole number from 1 to {_MOST_CHOICES}", param="n")
        for key in _UNSCANNABLE:
            if body.get(key) is not None:
                raise BadRequest(
                    f"{key} cannot be scanned and is not forwarded: leave it out",
                    code="unscannable",
                    param=key,
                )
        fields = tuple(_request_fields(body, messages))
        return Exchange(model, bool(stream), choices, fields, body)

    def parse_answer(self, exchange: Exchange, body: Mapping[str, Any]) -> Answer:
        """See ``Dialect.parse_answer``."""
        raw = body.get("choices")
        if not isinstance(raw, list) or not all(isinstance(item, dict) for item in raw):
            raise UpstreamMalformed("the upstream's answer has no list of choices")
        context = _turns(cast(list[Any], exchange.body["messages"]))
        choices = []
        for position, item in enumerate(raw):
            message = item.get("message")
            index = item.get("index", position)
            if not isinstance(message, dict) or type(index) is not int:
                raise UpstreamMalformed(f"choice {position} of the upstream's answer is no message")
            text = message.get("content")
            if not isinstance(text, str | None):
                raise UpstreamMalformed(f"choice {position} of the upstream's answer is not text")
            path = f"choices[{index}].message"
            fields = tuple(_message_fields(message, text or "", path, context, False))
            choices.append(Choice(index, fields, item))
        if len({choice.index for choice in choices}) != len(choices):
            raise UpstreamMalformed("two choices of the upstream's answer have the same index")
        usage = body.get("usage")
        usage = usage if isinstance(usage, dict) else {}
        return Answer(
            tuple(choices),
            body,
            _count(usage.get("prompt_tokens")),
            _count(usage.get("completion_tokens")),
        )

    def parse_stream(self, exchange: Exchange, events: list[str]) -> Answer:
        """See ``Dialect.parse_stream``."""
        head: dict[str, Any] = {}
        choices: dict[int, dict[str, Any]] = {}
        for data in events:
            if data == "[DONE]":
                continue
            try:
                chunk = json.loads(data)
            except ValueError:
                raise UpstreamMalformed("an event of the upstream's stream is not JSON") from None
            if not isinstance(chunk, dict) or not isinstance(chunk.get("choices"), list):
                raise UpstreamMalformed("an event of the upstream's stream is not a chunk")
            head |= {
                key: chunk[key] for key in chunk if key != "choices" and chunk[key] is not None
            }
            for item in chunk["choices"]:
                _add_delta(choices, item)
        if not choices:
            raise UpstreamMalformed("the upstream's stream ended without an answer")
        head |= {
            "object": "chat.completion",
            "choices": [choices[index] for index in sorted(choices)],
        }
        return self.parse_answer(exchange, head)

    def forwarded(self, exchange: Exchange) -> Mapping[str, Any] | None:
        """See ``Dialect.forwarded``: only our own key is taken out."""
        if "moderation" not in exchange.body:
            return None
        return {key: value for key, value in exchange.body.items() if key != "moderation"}

    def retried(self, exchange: Exchange, retry: Retry) -> Mapping[str, Any]:
        """See ``Dialect.retried``: another seed, and the instruction in the system message."""
        body = dict(self.forwarded(exchange) or exchange.body)
        messages = [dict(message) for message in body["messages"]]
        first = messages[0]
        if SPEAKERS[first["role"]] == "system" and isinstance(first.get("content"), str):
            # Many chat templates allow one system message, and only in front.
            first["content"] = f"{first['content']}\n\n{retry.instruction}"
        elif SPEAKERS[first["role"]] == "system" and isinstance(first.get("content"), list):
            first["content"] = [*first["content"], {"type": "text", "text": retry.instruction}]
        else:
            messages.insert(0, {"role": "system", "content": retry.instruction})
        return body | {"messages": messages, "seed": retry.seed, "n": retry.choices}

    def refused(self, exchange: Exchange, identity: str, created: int, refusal: Refusal) -> Answer:
        """See ``Dialect.refused``."""
        choices = tuple(
            self.refused_choice(exchange, index, refusal) for index in range(exchange.choices)
        )
        body = {
            "id": f"chatcmpl-{identity}",
            "object": "chat.completion",
            "created": created,
            "model": exchange.model,
            "choices": [choice.body for choice in choices],
            "usage": {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0},
        }
        return Answer(choices, body)

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

    def assembled(self, answer: Answer, choices: tuple[Choice, ...]) -> Mapping[str, Any]:
        """See ``Dialect.assembled``. Prompt-side echoes of another attempt are left out."""
        body = {key: value for key, value in answer.body.items() if key not in _ECHOES}
        return body | {"choices": [choice.body for choice in choices]}

    def streamed(self, exchange: Exchange, body: Mapping[str, Any]) -> bytes:
        """See ``Dialect.streamed``: role, text and end of each choice, usage if asked, [DONE]."""
        shared = {
            "id": body.get("id"),
            "object": "chat.completion.chunk",
            "created": body.get("created"),
            "model": body.get("model"),
        }

        def chunk(choices: list[dict[str, Any]], **more: Any) -> bytes:
            return sse.encode(dumps(shared | {"choices": choices} | more))

        parts = []
        for choice in body["choices"]:
            message = {k: v for k, v in choice["message"].items() if v is not None and v != []}
            for number, call in enumerate(message.get("tool_calls", ())):
                call.setdefault("index", number)
            opening = {"role": message.pop("role", "assistant"), "content": ""}
            index = choice["index"]
            for delta in (opening, message):
                parts.append(chunk([{"index": index, "delta": delta, "finish_reason": None}]))
            end = {"index": index, "delta": {}, "finish_reason": choice.get("finish_reason")}
            parts.append(chunk([end]))
        options = exchange.body.get("stream_options")
        if isinstance(options, dict) and options.get("include_usage"):
            parts.append(chunk([], usage=body.get("usage")))
        return b"".join((*parts, sse.DONE))


_ECHOES: Final = frozenset({"prompt_logprobs", "prompt_token_ids", "prompt_text"})


def conversation_fields(messages: list[Any]) -> Iterator[Field]:
    """All that the messages of a conversation say; ``BadRequest`` names one that is malformed."""
    turns = _turns(messages)
    last_answer = max(
        (i for i, turn in enumerate(turns[:-1]) if turn.speaker == "assistant"), default=-1
    )
    for number, message in enumerate(messages):
        context = turns[max(0, number - _CONTEXT_TURNS) : number]
        is_past = number <= last_answer and turns[number].speaker != "system"
        text = turns[number].text
        yield from _message_fields(message, text, f"messages[{number}]", context, is_past)


def _request_fields(body: Mapping[str, Any], messages: list[Any]) -> Iterator[Field]:
    yield from conversation_fields(messages)
    definitions = extractor.named(body, "tools", "functions")
    if definitions:
        yield Field("tool_definition", "tools", GuardInput("prompt", definitions))
    documents = extractor.leaves(body.get("documents"))
    if documents:
        yield Field("document", "documents", GuardInput("prompt", documents))
    rest = extractor.unknown(body, _REQUEST_KEYS)
    if rest:
        yield Field("other", "", GuardInput("prompt", rest))


_FIELD_OF_SPEAKER: Final[Mapping[Speaker, FieldName]] = {
    "user": "message",
    "system": "system",
    "tool": "tool_result",
    "assistant": "text",
}


def _turns(messages: list[Any]) -> tuple[Turn, ...]:
    """The conversation as turns, checking each message's shape."""
    turns = []
    for number, message in enumerate(messages):
        place = f"messages[{number}]"
        if not isinstance(message, dict):
            raise BadRequest(f"{place} must be an object", param=place)
        speaker = SPEAKERS.get(message["role"]) if isinstance(message.get("role"), str) else None
        if speaker is None:
            allowed = ", ".join(SPEAKERS)
            raise BadRequest(f"{place}.role must be one of: {allowed}", param=f"{place}.role")
        turns.append(Turn(speaker, _text(message.get("content"), f"{place}.content")))
    return tuple(turns)


def _message_fields(
    message: Mapping[str, Any], text: str, path: str, context: tuple[Turn, ...], is_past: bool
) -> Iterator[Field]:
    """All that a message says. What a model wrote is judged as a response, the rest as prompts."""
    speaker = SPEAKERS.get(message.get("role") or "assistant", "assistant")
    role: Role = "response" if speaker == "assistant" else "prompt"
    calls = message.get("tool_calls") or ()
    if message.get("function_call"):
        calls = (*calls, {"function": message["function_call"]})
    pieces: list[tuple[FieldName, str, str]] = [
        (_FIELD_OF_SPEAKER[speaker], "content", text),
        ("refusal", "refusal", extractor.leaves(message.get("refusal"))),
        ("reasoning", "reasoning", extractor.named(message, "reasoning", "reasoning_content")),
        ("tool_call", "tool_calls", "\n".join(map(_call_text, calls))),
        ("other", "", extractor.unknown(message, _MESSAGE_KEYS)),
    ]
    for name, key, piece in pieces:
        if piece and not piece.isspace():
            where = f"{path}.{key}" if key else path
            yield Field(name, where, GuardInput(role, piece, context), is_past)


def _text(content: Any, path: str) -> str:
    """The text of a message's content: a string, null, or a list of text parts."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise BadRequest(f"{path} must be a string or a list of parts", param=path)
    texts = []
    for number, part in enumerate(content):
        place = f"{path}[{number}]"
        if not isinstance(part, dict):
            raise BadRequest(f"{place} must be an object with a type", param=place)
        kind = part.get("type")
        if kind not in ("text", "refusal"):
            raise UnsupportedModality(
                f"{place} is not text: no guard here judges it, so it is not forwarded",
                param=place,
            )
        if not isinstance(part.get(kind), str):
            raise BadRequest(f"{place}.{kind} must be a string", param=f"{place}.{kind}")
        texts.append(extractor.leaves([part[key] for key in part if key != "type"]))
    return "\n".join(texts)


def _call_text(call: Any) -> str:
    """A tool call's name and arguments, and whatever else stands in it."""
    if not isinstance(call, dict):
        return extractor.leaves(call)
    function = call.get("function")
    function = function if isinstance(function, dict) else {"name": function}
    rest = {key: value for key, value in function.items() if key != "arguments"}
    others = {key: value for key, value in call.items() if key not in ("function", "id", "type")}
    return "\n".join(
        text
        for text in (
            extractor.leaves([*rest.values()]),
            extractor.arguments(function.get("arguments")),
            extractor.leaves([*others.values()]),
        )
        if text
    )


def _add_delta(choices: dict[int, dict[str, Any]], item: Any) -> None:
    """Adds a chunk's choice to the message that it belongs to."""
    if not isinstance(item, dict) or type(item.get("index")) is not int:
        raise UpstreamMalformed("a choice in the upstream's stream has no index")
    empty = {"index": item["index"], "message": {"role": "assistant"}, "finish_reason": None}
    choice = choices.setdefault(item["index"], empty)
    delta = item.get("delta")
    if not isinstance(delta, dict | None):
        raise UpstreamMalformed("a choice in the upstream's stream has no delta")
    choice |= {
        key: item[key]
        for key in item
        if key not in ("index", "delta", "logprobs") and item[key] is not None
    }
    message = choice["message"]
    for key, value in (delta or {}).items():
        if value is None:
            message.setdefault(key, None)
        elif key == "tool_calls":
            _add_calls(message.setdefault("tool_calls", []), value)
        elif key != "role" and isinstance(value, str):
            message[key] = (message.get(key) or "") + value
        else:
            message[key] = value


def _add_calls(calls: list[dict[str, Any]], deltas: Any) -> None:
    for delta in deltas if isinstance(deltas, list) else ():
        if not isinstance(delta, dict) or type(delta.get("index", 0)) is not int:
            raise UpstreamMalformed("a tool call in the upstream's stream has no index")
        position = delta.get("index", 0)
        if not 0 <= position <= len(calls):
            raise UpstreamMalformed("a tool call in the upstream's stream is out of order")
        if position == len(calls):
            calls.append({"function": {}})
        call = calls[position]
        for key, value in delta.items():
            if key == "function" and isinstance(value, dict):
                for name, text in value.items():
                    if isinstance(text, str):
                        call["function"][name] = call["function"].get(name, "") + text
            elif key != "index" and value is not None:
                call[key] = value


def _count(value: Any) -> int:
    return value if type(value) is int and value >= 0 else 0
