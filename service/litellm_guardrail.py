"""``POST /beta/litellm_basic_guardrail_api``: LiteLLM's gateway asks, and this guard decides.

LiteLLM sends what its own routes extracted: texts, and beside them the same conversation in the
shape of a chat, tools, tool calls and images. It enforces the answer itself.

Reference: LiteLLM, "Generic Guardrail API"; its ``generic_guardrail_api.py``, ``types/proxy``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any, Final

from models.inputs import GuardInput, Turn
from service import conversation, openai_format
from service.chat import ChatDialect, parse_messages
from service.conversation import Message
from service.errors import BadRequest, Unscannable
from service.exchange import Direction, Field, FieldName
from service.extractor import Piece, Reader, Scan
from service.judgement import Judgement
from service.policy import Action, Decision

PATH: Final = "/beta/litellm_basic_guardrail_api"

SCHEMA: Final[Mapping[str, Any]] = {
    "type": "object",
    "required": ["input_type"],
    "properties": {
        "input_type": {"enum": ["request", "response"]},
        "texts": {"type": ["array", "null"], "items": {"type": "string"}},
        "structured_messages": {
            "type": ["array", "null"],
            "items": ChatDialect.schema["properties"]["messages"]["items"],
        },
        "tools": {"type": ["array", "null"], "items": {"type": "object"}},
        "tool_calls": {"type": ["array", "null"], "items": {"type": "object"}},
        "images": {"type": ["array", "null"], "items": {"type": "string"}},
    },
}
"""JSON Schema of a request."""

_DIRECTIONS: Final[Mapping[str, Direction]] = {"request": "prompt", "response": "response"}
# What LiteLLM says of the call; no model reads it.
_ABOUT: Final = (
    "litellm_call_id", "litellm_trace_id", "litellm_version", "request_data", "request_headers",
    "additional_provider_specific_params", "model",
)  # fmt: skip


def parse(
    body: Mapping[str, Any], *, allow_unscannable: bool = False
) -> dict[Direction, list[Field]]:
    """The fields to judge, by direction: a ``response`` is judged as an answer to the messages.

    Raises ``BadRequest`` that names the key that is wrong, and ``Unscannable`` for images and the
    like unless ``allow_unscannable``.
    """
    reader = Reader(body)
    scan = Scan()
    kind = reader.take("input_type")
    direction = _DIRECTIONS.get(kind) if isinstance(kind, str) else None
    if direction is None:
        raise BadRequest("input_type must be request or response", param="input_type")
    texts = _texts(reader.take("texts"))
    conversed = reader.take("structured_messages")
    messages = _messages(conversed, scan)
    calls = _calls(reader.take("tool_calls"), scan)
    if reader.take("images"):
        scan.unscannable.append("images[0]")
    openai_format.definitions(reader, "tools", scan)
    for key in _ABOUT:
        reader.take(key)
    reader.rest(scan)
    if scan.unscannable and not allow_unscannable:
        place = scan.unscannable[0]
        raise Unscannable(f"{place} cannot be scanned by any guard here: leave it out", param=place)
    fields: dict[Direction, list[Field]] = {}
    if direction == "prompt" or messages:
        fields["prompt"] = list(conversation.fields(messages)) if messages else []
    said = {piece.text for message in messages for piece in message.pieces}
    said.update(_parts(conversed) if messages else ())
    context = conversation.turns(messages) if direction == "response" else ()
    own = fields.setdefault(direction, [])
    own += _beside(direction, "message" if direction == "prompt" else "text", texts, said, context)
    # Tool calls of a request are those of its past answers, and so are in its messages too.
    own += _beside(
        "response", "tool_call", calls, said if direction == "prompt" else set(), context
    )
    own += [
        Field(piece.name, piece.path, GuardInput(direction, piece.text)) for piece in scan.pieces
    ]
    return fields


def _beside(
    role: Direction,
    name: FieldName,
    pieces: Sequence[Piece],
    said: Set[str],
    context: tuple[Turn, ...],
) -> list[Field]:
    """Fields of what the messages do not hold already, where it is judged in its turn.

    Judged by themselves as well, a conversation's old texts would count as new ones.
    """
    return [
        Field(name, piece.path, GuardInput(role, piece.text, context))
        for piece in pieces
        if piece.text not in said
    ]


def _texts(value: Any) -> list[Piece]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise BadRequest("texts must be a list", param="texts")
    scan = Scan()
    for number, text in enumerate(value):
        place = f"texts[{number}]"
        if not isinstance(text, str):
            raise BadRequest(f"{place} must be a string", param=place)
        scan.add("text", place, text)
    return scan.pieces


def _messages(value: Any, scan: Scan) -> tuple[Message, ...]:
    """The conversation, which is a chat's, under LiteLLM's name for it."""
    if value is None or value == []:
        return ()
    own = Scan()
    try:
        messages = parse_messages(value, own)
    except BadRequest as error:
        # Both begin with the place.
        param = f"structured_{error.param}"
        raise BadRequest(f"structured_{error.message}", param=param) from None
    scan.unscannable += [f"structured_{place}" for place in own.unscannable]
    return tuple(
        Message(
            message.speaker,
            message.text,
            tuple(Piece(one.name, f"structured_{one.path}", one.text) for one in message.pieces),
        )
        for message in messages
    )


def _parts(messages: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The texts of parts, each of which LiteLLM sends by itself too."""
    for message in messages:
        content = message.get("content")
        for part in content if isinstance(content, list) else ():
            text = part.get("text") if isinstance(part, dict) else part
            if isinstance(text, str):
                yield text


def _calls(value: Any, scan: Scan) -> list[Piece]:
    """Tool calls, read as those of a message."""
    if not value:
        return []
    if not isinstance(value, list):
        raise BadRequest("tool_calls must be a list", param="tool_calls")
    own = Scan()
    (message,) = parse_messages([{"role": "assistant", "tool_calls": value}], own)
    scan.unscannable += [place.removeprefix("messages[0].") for place in own.unscannable]
    return [
        Piece(one.name, one.path.removeprefix("messages[0]").lstrip(".") or "tool_calls", one.text)
        for one in message.pieces
    ]


def render(
    judged: Mapping[Direction, tuple[Decision, Sequence[Judgement]]],
) -> dict[str, Any]:
    """The answer. ``BLOCKED`` where the policy would not let the text pass as it is.

    No texts are sent back: without them LiteLLM goes on with its own.
    """
    for direction, (decision, _) in judged.items():
        if decision.action >= Action.REGENERATE:
            return {"action": "BLOCKED", "blocked_reason": reason(direction, decision)}
    return {"action": "NONE", "blocked_reason": None}


def reason(direction: Direction, decision: Decision) -> str:
    """What LiteLLM's client reads: severity and categories, never text."""
    names = ", ".join(name.replace("_", " ") for name in decision.verdict.categories)
    what = "The request" if direction == "prompt" else "The answer"
    level = decision.verdict.level.label
    return f"{what} was blocked: judged to be of {level} severity" + (
        f" ({names})" if names else ""
    )
