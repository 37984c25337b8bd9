"""``POST /v1/guard``: the native check, which says what the policy would do and why.

A body holds ``prompt``, or ``prompt`` and ``response``, or ``messages`` as a chat has them; a chat
that ends with the assistant's turn asks about that turn as a response.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from models.inputs import GuardInput, Turn
from service import conversation, moderations
from service.chat import ChatDialect, parse_messages
from service.errors import BadRequest, Unscannable
from service.exchange import Direction, Field
from service.extractor import Scan
from service.judgement import Judgement
from service.policy import Decision, Policy

_KEYS = frozenset({"model", "prompt", "response", "messages"})
_MODEL: Final = {"type": ["string", "null"]}
_TEXT: Final = {"type": "string", "minLength": 1}
SCHEMA: Final[Mapping[str, Any]] = {
    "anyOf": [
        {
            "type": "object",
            "required": ["prompt"],
            "properties": {
                "model": _MODEL,
                "prompt": _TEXT,
                "response": {"anyOf": [_TEXT, {"type": "null"}]},
            },
            "additionalProperties": False,
        },
        {
            "type": "object",
            "required": ["messages"],
            "properties": {
                "model": _MODEL,
                "messages": ChatDialect.schema["properties"]["messages"],
            },
            "additionalProperties": False,
        },
    ]
}
"""JSON Schema of a request."""


def parse(body: Mapping[str, Any], guard_id: str) -> dict[Direction, list[Field]]:
    """The fields to judge, by direction."""
    moderations.check_model(body.get("model"), guard_id)
    for key in body:
        if key not in _KEYS:
            raise BadRequest(
                "a key of the body is unknown: send prompt, prompt and response, or messages"
            )
    if "messages" in body:
        if "prompt" in body or "response" in body:
            raise BadRequest("send either messages or prompt and response", param="messages")
        return _conversation(body["messages"])
    prompt = _text(body, "prompt")
    fields: dict[Direction, list[Field]] = {
        "prompt": [Field("message", "prompt", GuardInput("prompt", prompt))]
    }
    if body.get("response") is not None:
        judged = GuardInput("response", _text(body, "response"), (Turn("user", prompt),))
        fields["response"] = [Field("text", "response", judged)]
    return fields


def _conversation(messages: object) -> dict[Direction, list[Field]]:
    if not isinstance(messages, list) or not messages:
        raise BadRequest("messages must be a list with at least one message", param="messages")
    scan = Scan()
    said = parse_messages(messages, scan)
    if scan.unscannable:
        place = scan.unscannable[0]
        raise Unscannable(f"{place} cannot be scanned by any guard here: leave it out", param=place)
    if said[-1].speaker != "assistant":
        return {"prompt": list(conversation.fields(said))}
    asked = said[:-1]
    return {
        "prompt": list(conversation.fields(asked)),
        "response": list(conversation.answer_fields(conversation.turns(asked), said[-1])),
    }


def _text(body: Mapping[str, Any], key: str) -> str:
    text = body.get(key)
    if not isinstance(text, str) or not text:
        raise BadRequest(f"{key} must be a text", param=key)
    return text


def render(
    identity: str,
    guard_id: str,
    policy: Policy,
    judged: Mapping[Direction, tuple[Decision, Sequence[Judgement]]],
) -> dict[str, Any]:
    """The answer: what the policy would do in each direction, and the verdicts behind it."""
    return {
        "id": f"guard-{identity}",
        "model": guard_id,
        "policy": policy.label,
        "decisions": {
            direction: {
                "action": decision.action.label,
                "rule": decision.rule,
                "reason": reason(policy, decision),
            }
            for direction, (decision, _) in judged.items()
        },
        "verdicts": [
            {
                "direction": direction,
                "field": judgement.field.name,
                "path": judgement.field.path,
                "action": judgement.decision.action.label,
                **moderations.described(judgement.decision.verdict),
            }
            for direction, (_, judgements) in judged.items()
            for judgement in judgements
        ],
    }


def reason(policy: Policy, decision: Decision) -> str:
    """Why, in a sentence that names the verdict and the rule."""
    verdict = decision.verdict
    names = ", ".join(verdict.categories)
    found = f"severity {verdict.level.label}" + (f" ({names})" if names else "")
    rule = policy.rules[decision.rule]
    if rule.matches_everything:
        return f"{found}: no rule before the default, rules[{decision.rule}], matches"
    asked = "any category" if rule.categories == "any" else ", ".join(rule.categories)
    return (
        f"{found}: rules[{decision.rule}] matches {rule.direction} texts of severity"
        f" {rule.severity.label} or above in {asked}"
    )
