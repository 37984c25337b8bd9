"""Azure AI Content Safety's ``text:analyze`` and ``text:shieldPrompt``, over this guard.

Reference: Azure AI Content Safety REST API 2024-09-01, "Analyze Text" and "Shield Prompt"; Azure's
REST API guidelines on errors. ``api-version`` is not looked at, and a text may be of any length.
Blocklists are refused rather than passed over: whoever names one relies on it.

Severity. On the scale of four, none, minor, moderate and severe are 0, 2, 4 and 6. On that of eight
each of them has two numbers, as Azure folds 1 into 0, 3 into 2, 5 into 4 and 7 into 6: the higher
where the text's severity score, which runs from L/6 to (L+3)/6 at level L, is in the upper half. A
category that does not fire is 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from models import taxonomy
from models.inputs import GuardInput
from models.taxonomy import AZURE, AZURE_SEVERITY
from models.verdict import OPERATING_POINT, Verdict
from service import verdict_shapes
from service.errors import BadRequest, SluicegateError
from service.exchange import Field
from service.judgement import Judgement

ANALYZE_PATH: Final = "/contentsafety/text:analyze"
SHIELD_PATH: Final = "/contentsafety/text:shieldPrompt"

CATEGORIES: Final[Mapping[str, str]] = {
    "Hate": "hate",
    "SelfHarm": "self_harm",
    "Sexual": "sexual",
    "Violence": "violence",
}
"""The wire's names, in its order, and those of ``taxonomy.AZURE``."""
_FOUR: Final = "FourSeverityLevels"
_EIGHT: Final = "EightSeverityLevels"

ANALYZE_SCHEMA: Final[Mapping[str, Any]] = {
    "type": "object",
    "required": ["text"],
    "properties": {
        "text": {"type": "string", "minLength": 1},
        "categories": {"type": ["array", "null"], "items": {"enum": list(CATEGORIES)}},
        "blocklistNames": {"type": ["array", "null"], "maxItems": 0},
        "haltOnBlocklistHit": {"type": ["boolean", "null"]},
        "outputType": {"enum": [_FOUR, _EIGHT, None]},
    },
    "additionalProperties": False,
}
SHIELD_SCHEMA: Final[Mapping[str, Any]] = {
    "type": "object",
    "anyOf": [
        {"required": ["userPrompt"], "properties": {"userPrompt": {"type": "string"}}},
        {"required": ["documents"], "properties": {"documents": {"type": "array"}}},
    ],
    "properties": {
        "userPrompt": {"type": ["string", "null"]},
        "documents": {"type": ["array", "null"], "items": {"type": "string"}},
    },
    "additionalProperties": False,
}
"""JSON Schemas of the requests."""

# Azure's code for each status.
_CODES: Final[Mapping[int, str]] = {
    400: "InvalidRequestBody",
    # Azure's own gateway, which checks keys, has the bare number.
    401: "401",
    403: "403",
    404: "NotFound",
    405: "MethodNotAllowed",
    408: "RequestTimeout",
    413: "InvalidRequestBody",
    429: "TooManyRequests",
    503: "ServerBusy",
}


@dataclass(frozen=True, slots=True)
class Analysis:
    """What ``text:analyze`` is asked: a text, and of which categories on which scale."""

    fields: tuple[Field, ...]
    categories: tuple[str, ...]
    has_eight_levels: bool


@dataclass(frozen=True, slots=True)
class Shield:
    """What ``text:shieldPrompt`` is asked. ``documents`` is their number, blank ones included."""

    fields: tuple[Field, ...]
    has_prompt: bool
    documents: int


def parse_analyze(body: Mapping[str, Any]) -> Analysis:
    """What is asked; ``BadRequest`` names the key that is wrong."""
    _refuse_unknown(body, ANALYZE_SCHEMA)
    text = body.get("text")
    if not isinstance(text, str) or not text:
        raise BadRequest("text must be a string that is not empty", param="text")
    lists = body.get("blocklistNames")
    if lists is not None and lists != []:
        raise BadRequest(
            "blocklistNames must be empty: there are no blocklists here", param="blocklistNames"
        )
    if not isinstance(body.get("haltOnBlocklistHit"), bool | None):
        raise BadRequest("haltOnBlocklistHit must be true or false", param="haltOnBlocklistHit")
    kind = body.get("outputType")
    if kind not in (None, _FOUR, _EIGHT):
        raise BadRequest(f"outputType must be {_FOUR} or {_EIGHT}", param="outputType")
    field = Field("message", "text", GuardInput("prompt", text))
    return Analysis((field,), _categories(body.get("categories")), kind == _EIGHT)


def _categories(value: Any) -> tuple[str, ...]:
    """Those that are asked for; all where none are."""
    if value is None or value == []:
        return tuple(CATEGORIES)
    if not isinstance(value, list):
        raise BadRequest("categories must be a list", param="categories")
    for number, name in enumerate(value):
        if not isinstance(name, str) or name not in CATEGORIES:
            place = f"categories[{number}]"
            raise BadRequest(f"{place} must be one of: {', '.join(CATEGORIES)}", param=place)
    return tuple(name for name in CATEGORIES if name in value)


def render_analyze(asked: Analysis, verdict: Verdict) -> dict[str, Any]:
    """The answer on one text."""
    levels = verdict_shapes.azure_levels(verdict)
    analyses = []
    for name in asked.categories:
        severity = AZURE_SEVERITY[levels[CATEGORIES[name]]][1]
        if asked.has_eight_levels and _is_upper(verdict, CATEGORIES[name]):
            severity += 1
        analyses.append({"category": name, "severity": severity})
    return {"blocklistsMatch": [], "categoriesAnalysis": analyses}


def _is_upper(verdict: Verdict, category: str) -> bool:
    """Whether a category fires, and the text is in the upper half of its level."""
    fires = taxonomy.evaluate(AZURE[category], verdict.scores()) >= OPERATING_POINT
    return fires and verdict.severity_score >= (verdict.level + 1.5) / 6


def parse_shield(body: Mapping[str, Any]) -> Shield:
    """What is asked; ``BadRequest`` names the key that is wrong."""
    _refuse_unknown(body, SHIELD_SCHEMA)
    prompt, documents = body.get("userPrompt"), body.get("documents")
    if prompt is None and documents is None:
        raise BadRequest("send userPrompt, documents, or both", param="userPrompt")
    if not isinstance(prompt, str | None):
        raise BadRequest("userPrompt must be a string", param="userPrompt")
    if not isinstance(documents, list | None):
        raise BadRequest("documents must be a list", param="documents")
    fields = []
    if prompt and not prompt.isspace():
        fields.append(Field("message", "userPrompt", GuardInput("prompt", prompt)))
    for number, text in enumerate(documents or []):
        place = f"documents[{number}]"
        if not isinstance(text, str):
            raise BadRequest(f"{place} must be a string", param=place)
        if text and not text.isspace():
            fields.append(Field("document", place, GuardInput("prompt", text)))
    return Shield(tuple(fields), prompt is not None, len(documents or []))


def render_shield(asked: Shield, judgements: Sequence[Judgement]) -> dict[str, Any]:
    """The answer: where the guard sees an attack on the model, whatever the harm."""
    attacks = {one.field.path for one in judgements if "injection" in one.decision.verdict.signals}
    shown: dict[str, Any] = {}
    if asked.has_prompt:
        shown["userPromptAnalysis"] = {"attackDetected": "userPrompt" in attacks}
    shown["documentsAnalysis"] = [
        {"attackDetected": f"documents[{number}]" in attacks} for number in range(asked.documents)
    ]
    return shown


def error_body(error: SluicegateError, identity: str) -> Mapping[str, Any]:
    """The body of an error as Azure has it; our own code stands inside."""
    del identity
    shown: dict[str, Any] = {
        "code": _CODES.get(error.status, "InternalError"),
        "message": error.message,
    }
    if error.param is not None:
        shown["target"] = error.param
    return {"error": shown | {"innererror": {"code": error.code}}}


def _refuse_unknown(body: Mapping[str, Any], schema: Mapping[str, Any]) -> None:
    for key in body:
        if key not in schema["properties"]:
            known = ", ".join(schema["properties"])
            raise BadRequest(f"a key of the body is unknown: send {known}")
