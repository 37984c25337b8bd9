"""``POST /v1/moderations`` as OpenAI has it, with severity and our own categories beside.

Reference: OpenAI API, "Create moderation". The 13 keys stand in ``categories``; ours stand apart in
``harm_categories``, because both taxonomies have a ``violence``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from models import taxonomy
from models.inputs import GuardInput
from models.taxonomy import CATEGORIES, SIGNALS, Severity
from models.verdict import OPERATING_POINT, Coverage, Verdict
from service.errors import BadRequest, TooLarge, UnknownModel, Unscannable
from service.exchange import Field

_PART_SCHEMAS: Final[list[Mapping[str, Any]]] = [
    {
        "type": "object",
        "required": ["type", "text"],
        "properties": {"type": {"enum": ["text"]}, "text": {"type": "string", "minLength": 1}},
    },
    {"type": "object", "required": ["type"], "properties": {"type": {"enum": ["image_url"]}}},
]
SCHEMA: Final[Mapping[str, Any]] = {
    "type": "object",
    "required": ["input"],
    "properties": {
        "model": {"type": ["string", "null"]},
        "input": {
            "anyOf": [
                {"type": "string", "minLength": 1},
                {"type": "array", "minItems": 1, "items": {"type": "string", "minLength": 1}},
                {"type": "array", "minItems": 1, "items": {"anyOf": _PART_SCHEMAS}},
            ]
        },
    },
}
"""JSON Schema of a request."""

_ALIASES: Final = re.compile(r"(omni|text)-moderation-[a-z0-9.-]{1,64}")


def parse(body: Mapping[str, Any], guard_id: str, most_inputs: int) -> list[Field]:
    """One field for each result that is asked for."""
    check_model(body.get("model"), guard_id)
    if "input" not in body:
        raise BadRequest("input is missing: send a string or a list", param="input")
    texts = _texts(body["input"])
    if len(texts) > most_inputs:
        raise TooLarge(
            f"{len(texts)} inputs are over the {most_inputs} that one request may hold: send them"
            " in several requests",
            code="too_many_inputs",
            param="input",
        )
    return [
        Field("message", f"input[{number}]", GuardInput("prompt", text))
        for number, text in enumerate(texts)
    ]


def check_model(model: object, guard_id: str) -> None:
    """Accepts no name, ours, and OpenAI's moderation models, which are aliases of ours."""
    if model is None or model == guard_id:
        return
    if not isinstance(model, str):
        raise BadRequest("model must be a string", param="model")
    if not _ALIASES.fullmatch(model):
        raise UnknownModel(
            f"model is not one that moderates here: use {guard_id} or omni-moderation-latest",
            param="model",
        )


def _texts(value: object) -> list[str]:
    if isinstance(value, str):
        return [_not_empty(value, "input")]
    if not isinstance(value, list):
        raise BadRequest("input must be a string or a list", param="input")
    if not value:
        raise BadRequest("input is empty: send at least one text", param="input")
    if isinstance(value[0], dict):
        return ["\n".join(_part(part, f"input[{n}]") for n, part in enumerate(value))]
    return [_not_empty(text, f"input[{number}]") for number, text in enumerate(value)]


def _part(part: object, path: str) -> str:
    if not isinstance(part, dict):
        raise BadRequest(f"{path} must be an object, as the parts before it", param=path)
    kind = part.get("type")
    if kind == "text":
        return _not_empty(part.get("text"), f"{path}.text")
    if kind == "image_url":
        raise Unscannable(f"{path} is an image, which no guard here judges yet", param=path)
    raise BadRequest(f"{path}.type must be text or image_url", param=f"{path}.type")


def _not_empty(text: object, path: str) -> str:
    if not isinstance(text, str):
        raise BadRequest(f"{path} must be a string", param=path)
    if not text:
        raise BadRequest(f"{path} is empty: send a text", param=path)
    return text


def render(identity: str, guard_id: str, verdicts: list[Verdict]) -> dict[str, Any]:
    """The answer: one result a verdict."""
    return {
        "id": f"modr-{identity}",
        "model": guard_id,
        "results": [result(verdict) for verdict in verdicts],
    }


def result(verdict: Verdict) -> dict[str, Any]:
    """One of ``results``. ``flagged`` where the level is not none or any of the 13 holds."""
    named = verdict.scores()
    scores = {
        key: taxonomy.evaluate(expression, named) for key, expression in taxonomy.OPENAI.items()
    }
    is_harmful = verdict.level > Severity.NONE
    # Self-harm rests on a signal, which needs no harm: a person who seeks help is shown too.
    flags = {
        key: score >= OPERATING_POINT and (is_harmful or key in _BY_SIGNAL_ALONE)
        for key, score in scores.items()
    }
    return {
        "flagged": is_harmful or any(flags.values()),
        "categories": flags,
        "category_scores": {key: round(score, 6) for key, score in scores.items()},
        "category_applied_input_types": {key: ["text"] for key in scores},
        **described(verdict),
    }


def described(verdict: Verdict) -> dict[str, Any]:
    """A verdict in our own words."""
    level = verdict.level
    return {
        "severity": level.label,
        "severity_score": round(verdict.severity_score, 6),
        "harm_categories": {
            name: {
                "score": round(score, 6),
                "severity": (level if score >= OPERATING_POINT else Severity.NONE).label,
            }
            for name, score in zip(CATEGORIES, verdict.category_scores, strict=True)
        },
        "signals": {
            name: round(score, 6)
            for name, score in zip(SIGNALS, verdict.signal_scores, strict=True)
        },
        "coverage": _coverage(verdict.coverage),
    }


def _coverage(coverage: Coverage) -> dict[str, Any]:
    return {
        "characters": {
            "judged": coverage.characters_judged,
            "total": coverage.characters_total,
        },
        "windows": coverage.windows,
        "images": {"judged": 0, "total": 0},
    }


_BY_SIGNAL_ALONE: Final = frozenset(
    key
    for key, expression in taxonomy.OPENAI.items()
    if all(name in SIGNALS for group in expression for name in group)
)
