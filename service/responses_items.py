"""The items of ``/v1/responses``: what a conversation holds, and what an answer does.

Reference: OpenAI API, "Create a model response" (``input``) and "The response object" (``output``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

from models.inputs import Speaker
from service import extractor
from service.conversation import Message
from service.errors import BadRequest
from service.exchange import FieldName
from service.extractor import Piece, Reader, Scan

SPEAKERS: Final[Mapping[str, Speaker]] = {
    "user": "user",
    "assistant": "assistant",
    "system": "system",
    "developer": "system",
}
_FIELD_OF_SPEAKER: Final[Mapping[Speaker, FieldName]] = {
    "user": "message",
    "system": "system",
    "tool": "tool_result",
    "assistant": "text",
}
_TEXT_PARTS: Final = frozenset(
    {"text", "input_text", "output_text", "summary_text", "reasoning_text"}
)
_CALLS: Final = frozenset({"function_call", "custom_tool_call"})
_OUTPUTS: Final = frozenset(
    {"function_call_output", "custom_tool_call_output", "local_shell_call_output"}
)
_OPAQUE: Final = frozenset(
    {"item_reference", "image_generation_call", "computer_call_output", "compaction"}
)
"""Items that hold pictures, ciphertext, or what only the upstream can look up."""
_MEDIA: Final = frozenset(
    {
        "image", "input_image", "output_image", "image_url", "computer_screenshot", "input_file",
        "file", "input_audio", "output_audio", "audio", "input_video", "video",
    }
)  # fmt: skip
_ITEM_WORDS: Final = frozenset({"type", "id", "call_id", "status", "phase", "role"})
_PART_SCHEMAS: Final[list[Mapping[str, Any]]] = [
    {"type": "string"},
    *(
        {
            "type": "object",
            "required": ["type", key],
            "properties": {"type": {"enum": kinds}, key: {"type": "string"}},
        }
        for key, kinds in (("text", sorted(_TEXT_PARTS)), ("refusal", ["refusal"]))
    ),
    {
        "type": "object",
        "properties": {
            "type": {"type": "string", "not": {"enum": [*sorted(_TEXT_PARTS), "refusal"]}}
        },
    },
]
_CONTENT_SCHEMA: Final[Mapping[str, Any]] = {
    "anyOf": [
        {"type": ["string", "null"]},
        {"type": "array", "items": {"anyOf": _PART_SCHEMAS}},
    ]
}
_WITH_PARTS: Final = ["message", "reasoning", *sorted(_OUTPUTS)]
ITEM_SCHEMA: Final[Mapping[str, Any]] = {
    "anyOf": [
        {
            "type": "object",
            "required": ["role"],
            "properties": {
                "type": {"enum": ["message", None]},
                "role": {"type": "string", "enum": list(SPEAKERS)},
                "content": _CONTENT_SCHEMA,
            },
        },
        {
            "type": "object",
            "required": ["type"],
            "properties": {
                "type": {"enum": _WITH_PARTS[1:]},
                "summary": _CONTENT_SCHEMA,
                "content": _CONTENT_SCHEMA,
                "output": _CONTENT_SCHEMA,
            },
        },
        {
            "type": "object",
            "required": ["type"],
            "properties": {"type": {"type": "string", "not": {"enum": _WITH_PARTS}}},
        },
    ]
}
"""JSON Schema of an item of an input."""
_STORED_ELSEWHERE: Final = ("prompt", "conversation")
"""In place of an input: what only the upstream can look up."""


def parse_items(
    instructions: Any, value: Any, body: Mapping[str, Any], scan: Scan
) -> tuple[Message, ...]:
    """What a request says, in order. An assistant's items in a row are one message, as models
    read them: else its last words would make the question before them one that was answered.
    """
    messages: list[Message] = []
    if instructions is not None and not isinstance(instructions, str):
        raise BadRequest("instructions must be a string", param="instructions")
    if instructions:
        pieces = _texts("system", "instructions", instructions)
        messages.append(Message("system", instructions, pieces))
    if isinstance(value, str):
        messages.append(Message("user", value, _texts("message", "input", value)))
        return tuple(messages)
    if value is None and any(body.get(key) is not None for key in _STORED_ELSEWHERE):
        return tuple(messages)
    if not isinstance(value, list) or not value:
        raise BadRequest("input must be a string or a list with at least one item", param="input")
    for number, item in enumerate(value):
        own = Scan(unscannable=scan.unscannable)
        message = parse_item(item, f"input[{number}]", own, is_answer=False)
        last = messages[-1] if messages else None
        if last is not None and last.speaker == message.speaker == "assistant":
            text = "\n".join(text for text in (last.text, message.text) if text)
            messages[-1] = Message("assistant", text, last.pieces + message.pieces)
        else:
            messages.append(message)
    return tuple(messages)


def _texts(name: FieldName, path: str, text: str) -> tuple[Piece, ...]:
    scan = Scan()
    scan.add(name, path, text)
    return tuple(scan.pieces)


def parse_item(value: Any, path: str, scan: Scan, *, is_answer: bool) -> Message:
    """All that an item of an input or an output says; ``BadRequest`` if it is malformed."""
    if not isinstance(value, dict):
        raise BadRequest(f"{path} must be an object", param=path)
    kind = value.get("type")
    if kind is None:
        kind = "message" if "role" in value else "item_reference"
    if not isinstance(kind, str):
        raise BadRequest(f"{path}.type must be a string", param=f"{path}.type")
    reader = Reader(value, path)
    speaker: Speaker = "assistant" if is_answer else "user"
    said = ""
    # The parts of these are looked at one by one.
    beside = {key: inner for key, inner in value.items() if key not in ("content", "output")}
    has_parts = kind in _OUTPUTS or kind in ("message", "reasoning")
    if kind in _OPAQUE or _holds_media(list((beside if has_parts else value).values())):
        scan.unscannable.append(path)
        return Message(speaker, said, ())
    if kind == "message":
        if not is_answer:
            speaker = _speaker(reader)
        field = _FIELD_OF_SPEAKER[speaker]
        said = _content(reader, "content", field, scan, is_answer=is_answer)
    elif kind in _CALLS:
        speaker = "assistant"
        texts = [extractor.leaves(reader.take(key)) for key in ("name", "namespace", "input")]
        texts.append(extractor.arguments(reader.take("arguments")))
        scan.add("tool_call", path, _joined(texts))
    elif kind in _OUTPUTS:
        speaker = "assistant" if is_answer else "tool"
        said = _content(reader, "output", "tool_result", scan, is_answer=is_answer)
    elif kind == "reasoning":
        speaker = "assistant"
        for key in ("summary", "content"):
            _content(reader, key, "reasoning", scan, is_answer=is_answer)
    else:
        scan.add("other", reader.where("arguments"), extractor.arguments(reader.take("arguments")))
    reader.refuse(scan, ("encrypted_content",))
    reader.pass_words(_ITEM_WORDS)
    reader.rest(scan)
    return Message(speaker, said, tuple(scan.pieces))


def _speaker(reader: Reader) -> Speaker:
    role = reader.take("role")
    speaker = SPEAKERS.get(role) if isinstance(role, str) else None
    if speaker is None:
        place = reader.where("role")
        raise BadRequest(f"{place} must be one of: {', '.join(SPEAKERS)}", param=place)
    return speaker


def _content(reader: Reader, key: str, field: FieldName, scan: Scan, *, is_answer: bool) -> str:
    """Takes a string or a list of parts as ``field``; gives the text of it."""
    content, path = reader.take(key), reader.where(key)
    if content is None:
        return ""
    if isinstance(content, str):
        scan.add(field, path, content)
        return content
    if not isinstance(content, list):
        raise BadRequest(f"{path} must be a string or a list of parts", param=path)
    texts: list[str] = []
    refusals: list[str] = []
    for number, part in enumerate(content):
        place = f"{path}[{number}]"
        if isinstance(part, str):
            texts.append(part)
            continue
        if not isinstance(part, dict):
            raise BadRequest(f"{place} must be an object with a type", param=place)
        inner = Reader(part, place)
        kind = inner.take("type")
        if not isinstance(kind, str) or (kind not in _TEXT_PARTS and kind != "refusal"):
            scan.unscannable.append(place)
            continue
        name = "refusal" if kind == "refusal" else "text"
        text = inner.take(name)
        if not isinstance(text, str):
            raise BadRequest(f"{inner.where(name)} must be a string", param=inner.where(name))
        (refusals if kind == "refusal" else texts).append(text)
        if is_answer:
            # The same tokens as the text that is judged, one by one.
            inner.take("logprobs")
        inner.rest(scan)
    scan.add(field, path, _joined(texts))
    scan.add("refusal" if field == "text" else field, path, _joined(refusals))
    return _joined([*texts, *refusals])


def _joined(texts: Iterable[str]) -> str:
    return "\n".join(text for text in texts if text)


def _holds_media(value: Any) -> bool:
    """Whether anything in ``value`` says that it is a picture, a sound or a file."""
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, dict):
            kind = item.get("type")
            if isinstance(kind, str) and kind in _MEDIA:
                return True
            stack.extend(item.values())
        elif isinstance(item, list):
            stack.extend(item)
    return False
