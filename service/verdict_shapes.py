"""Verdicts in the shapes that clients parse: OpenAI's ``moderation``, Azure's filter results.

References: OpenAI API, "The chat completion object" (``moderation``); Azure OpenAI, "Content
filtering" (``prompt_filter_results`` and ``content_filter_results``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from models import taxonomy
from models.taxonomy import AZURE, AZURE_SEVERITY, Severity
from models.verdict import OPERATING_POINT, Verdict
from service import moderations
from service.exchange import Annotations

_RESULT_KEYS: Final = (
    "flagged", "categories", "category_scores", "category_applied_input_types",
)  # fmt: skip
_UNJUDGED: Final = {
    "type": "error",
    "code": "guard_unavailable",
    "message": "no guard judged this text, and the policy lets that pass",
}
_NOT_GENERATED: Final = {
    "type": "error",
    "code": "not_generated",
    "message": "the prompt was blocked, so there is no answer to judge",
}
_AZURE_UNJUDGED: Final = {
    "error": {"code": "content_filter_error", "message": "The contents are not filtered"}
}


def moderation(asked: Annotations) -> Mapping[str, Any]:
    """``moderation`` of a chat completion: one result for the prompt, one for each choice."""
    return {
        "input": _results(asked.guard, [asked.prompt]),
        "output": _results(asked.guard, [asked.choices[i] for i in sorted(asked.choices)]),
    }


def response_moderation(asked: Annotations) -> Mapping[str, Any]:
    """``moderation`` of a response, which has one result a side rather than a list."""
    outputs = list(asked.choices.values())
    return {
        "input": _result(asked.guard, asked.prompt) if asked.prompt else dict(_UNJUDGED),
        "output": _single(asked.guard, outputs),
    }


def prompt_filter_results(asked: Annotations) -> list[Mapping[str, Any]]:
    """Azure's annotation of the prompt; ``filtered`` where nothing was generated for it."""
    results = filter_results(asked.prompt, is_filtered=not asked.choices)
    if asked.prompt is not None:
        is_attack = "injection" in asked.prompt.signals
        results |= {
            "jailbreak": {"filtered": is_attack and not asked.choices, "detected": is_attack}
        }
    return [{"prompt_index": 0, "content_filter_results": results}]


def choice_filter_results(asked: Annotations, index: int) -> Mapping[str, Any]:
    """Azure's annotation of one choice; none where it was not generated."""
    if index not in asked.choices:
        return {}
    return filter_results(asked.choices[index], is_filtered=index in asked.refused)


def filter_results(verdict: Verdict | None, *, is_filtered: bool) -> dict[str, Any]:
    """Azure's four categories with their severity; ``filtered`` where that stopped it."""
    if verdict is None:
        return dict(_AZURE_UNJUDGED)
    return {
        name: {
            "filtered": is_filtered and level > Severity.NONE,
            "severity": AZURE_SEVERITY[level][0],
        }
        for name, level in azure_levels(verdict).items()
    }


def azure_levels(verdict: Verdict) -> Mapping[str, Severity]:
    """The severity of each of Azure's four categories: the text's where the category fires."""
    named = verdict.scores()
    return {
        name: (
            verdict.level
            if taxonomy.evaluate(expression, named) >= OPERATING_POINT
            else Severity.NONE
        )
        for name, expression in AZURE.items()
    }


def _results(guard: str, verdicts: list[Verdict | None]) -> Mapping[str, Any]:
    if not verdicts:
        return dict(_NOT_GENERATED)
    judged = [verdict for verdict in verdicts if verdict is not None]
    if len(judged) < len(verdicts):
        return dict(_UNJUDGED)
    return {
        "type": "moderation_results",
        "model": guard,
        "results": [_result(guard, verdict) for verdict in judged],
    }


def _single(guard: str, verdicts: list[Verdict | None]) -> Mapping[str, Any]:
    if not verdicts:
        return dict(_NOT_GENERATED)
    return _result(guard, verdicts[0]) if verdicts[0] else dict(_UNJUDGED)


def _result(guard: str, verdict: Verdict) -> Mapping[str, Any]:
    shown = moderations.result(verdict)
    return {
        "type": "moderation_result",
        "model": guard,
        **{key: shown[key] for key in _RESULT_KEYS},
        "severity": shown["severity"],
        "severity_score": shown["severity_score"],
        "harm_categories": shown["harm_categories"],
        "signals": shown["signals"],
    }
