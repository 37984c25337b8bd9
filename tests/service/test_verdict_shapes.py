"""Verdicts as clients parse them: with OpenAI's own types, and Azure's tables."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from openai.types.chat import ChatCompletion
from openai.types.responses import Response

from models.taxonomy import AZURE, CATEGORIES, OPENAI, SIGNALS, Severity
from models.verdict import Coverage, Verdict
from service import verdict_shapes
from service.exchange import Annotations

AT_LEAST = {
    Severity.NONE: (0.1, 0.05, 0.01),
    Severity.MINOR: (0.9, 0.3, 0.1),
    Severity.MODERATE: (0.95, 0.8, 0.2),
    Severity.SEVERE: (0.99, 0.95, 0.9),
}


def verdict(level: Severity = Severity.NONE, *fired: str) -> Verdict:
    """One of ``level`` in which the categories and signals of ``fired`` hold."""
    assert set(fired) <= {*CATEGORIES, *SIGNALS}
    return Verdict(
        "prompt",
        AT_LEAST[level],
        tuple(0.8 if name in fired else 0.1 for name in CATEGORIES),
        tuple(0.8 if name in fired else 0.1 for name in SIGNALS),
        Coverage(1, 1, 1),
    )


SAFE = verdict()
HATE = verdict(Severity.MODERATE, "discriminatory_behavior")
VIOLENT = verdict(Severity.SEVERE, "violence")
ATTACK = verdict(Severity.NONE, "injection")


def asked(
    prompt: Verdict | None = SAFE,
    choices: Mapping[int, Verdict | None] | None = None,
    refused: Sequence[int] = (),
) -> Annotations:
    given = {0: SAFE} if choices is None else choices
    return Annotations("guard-1", prompt, given, frozenset(refused), openai=True, azure=True)


def completion(annotations: Annotations) -> ChatCompletion:
    """As the client reads it, and strictly: whatever its types do not allow fails."""
    message = {"role": "assistant", "content": "hello", "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
    return ChatCompletion.model_validate(
        {
            "id": "1",
            "object": "chat.completion",
            "created": 1,
            "model": "m",
            "choices": [choice],
            "moderation": verdict_shapes.moderation(annotations),
        }
    )


def response(annotations: Annotations) -> Response:
    return Response.model_validate(
        {
            "id": "1",
            "object": "response",
            "created_at": 1,
            "model": "m",
            "output": [],
            "parallel_tool_calls": True,
            "tool_choice": "auto",
            "tools": [],
            "moderation": verdict_shapes.response_moderation(annotations),
        }
    )


class TestOpenAIChat:
    def test_there_is_one_result_for_the_prompt_and_one_for_each_choice(self) -> None:
        shown = completion(asked(HATE, {1: VIOLENT, 0: SAFE})).moderation
        assert shown is not None
        assert shown.input.type == "moderation_results"
        assert shown.output.type == "moderation_results"
        assert (shown.input.model, shown.output.model) == ("guard-1", "guard-1")
        (of_prompt,) = shown.input.results
        assert (of_prompt.flagged, of_prompt.model) == (True, "guard-1")
        assert [key for key, held in of_prompt.categories.items() if held] == ["hate"]
        # In the order of the choices' numbers, whatever the order in which they were judged.
        assert [one.flagged for one in shown.output.results] == [False, True]

    def test_a_result_has_all_of_the_13_keys_and_what_is_ours_beside_them(self) -> None:
        shown = completion(asked(HATE)).moderation
        assert shown is not None
        assert shown.input.type == "moderation_results"
        (result,) = shown.input.results
        for values in (
            result.categories,
            result.category_scores,
            result.category_applied_input_types,
        ):
            assert [*values] == [*OPENAI]
        assert result.category_scores["hate"] == 0.8
        extra = result.model_extra or {}
        assert extra["severity"] == "moderate"
        assert 0 < extra["severity_score"] < 1
        assert extra["harm_categories"]["discriminatory_behavior"]["severity"] == "moderate"
        assert [*extra["signals"]] == [*SIGNALS]

    @pytest.mark.parametrize("choices", [{0: None}, {0: SAFE, 1: None}])
    def test_where_no_verdict_could_be_had_it_is_an_error(
        self, choices: Mapping[int, Verdict | None]
    ) -> None:
        shown = completion(asked(None, choices)).moderation
        assert shown is not None
        assert shown.input.type == "error"
        assert shown.output.type == "error"
        assert shown.input.code == shown.output.code == "guard_unavailable"

    def test_where_the_prompt_was_blocked_there_is_no_answer_to_judge(self) -> None:
        shown = completion(asked(VIOLENT, {})).moderation
        assert shown is not None
        assert shown.input.type == "moderation_results"
        assert shown.output.type == "error"
        assert shown.output.code == "not_generated"


class TestOpenAIResponses:
    def test_there_is_one_result_a_side(self) -> None:
        shown = response(asked(HATE, {0: VIOLENT})).moderation
        assert shown is not None
        assert shown.input.type == "moderation_result"
        assert shown.output.type == "moderation_result"
        assert (shown.input.model, shown.output.model) == ("guard-1", "guard-1")
        assert shown.input.categories["hate"]
        assert shown.output.categories["violence"]
        assert (shown.input.model_extra or {})["severity"] == "moderate"

    def test_a_side_without_a_verdict_is_an_error(self) -> None:
        shown = response(asked(None, {0: None})).moderation
        assert shown is not None
        assert shown.input.type == "error"
        assert shown.output.type == "error"
        assert shown.input.code == shown.output.code == "guard_unavailable"

    def test_where_the_prompt_was_blocked_there_is_no_answer_to_judge(self) -> None:
        shown = response(asked(VIOLENT, {})).moderation
        assert shown is not None
        assert shown.output.type == "error"
        assert shown.output.code == "not_generated"


def severities(results: Mapping[str, Any]) -> dict[str, str]:
    return {name: results[name]["severity"] for name in AZURE}


def filtered(results: Mapping[str, Any]) -> set[str]:
    return {name for name, one in results.items() if one["filtered"]}


class TestAzure:
    @pytest.mark.parametrize(
        ("level", "word"),
        [
            (Severity.NONE, "safe"),
            (Severity.MINOR, "low"),
            (Severity.MODERATE, "medium"),
            (Severity.SEVERE, "high"),
        ],
    )
    def test_each_level_has_azures_word(self, level: Severity, word: str) -> None:
        shown = verdict_shapes.filter_results(verdict(level, "violence"), is_filtered=True)
        assert severities(shown) == dict.fromkeys(AZURE, "safe") | {"violence": word}
        assert filtered(shown) == ({"violence"} if level else set())

    @pytest.mark.parametrize(
        ("fired", "names"),
        [
            ("discriminatory_behavior", {"hate"}),
            ("insulting_behavior", {"hate"}),
            ("self_harm", {"self_harm"}),
            ("sexual_content", {"sexual"}),
            ("violence", {"violence"}),
            ("physical_harm", {"violence"}),
            ("animal_abuse", {"violence"}),
            ("endangering_national_security", {"violence"}),
            ("drugs", set()),
            ("injection", set()),
        ],
    )
    def test_a_category_has_the_texts_severity_where_it_fires(
        self, fired: str, names: set[str]
    ) -> None:
        levels = verdict_shapes.azure_levels(verdict(Severity.SEVERE, fired))
        assert levels == {
            name: Severity.SEVERE if name in names else Severity.NONE for name in AZURE
        }

    def test_a_person_who_seeks_help_is_not_harmful(self) -> None:
        levels = verdict_shapes.azure_levels(verdict(Severity.NONE, "self_harm"))
        assert set(levels.values()) == {Severity.NONE}

    def test_a_prompt_that_was_blocked_is_filtered_and_one_that_was_answered_is_not(self) -> None:
        (blocked,) = verdict_shapes.prompt_filter_results(asked(HATE, {}))
        (answered,) = verdict_shapes.prompt_filter_results(asked(HATE))
        assert blocked["prompt_index"] == answered["prompt_index"] == 0
        assert filtered(blocked["content_filter_results"]) == {"hate"}
        assert filtered(answered["content_filter_results"]) == set()
        for one in (blocked, answered):
            assert severities(one["content_filter_results"])["hate"] == "medium"

    @pytest.mark.parametrize(
        ("prompt", "choices", "expected"),
        [
            (SAFE, {0: SAFE}, {"filtered": False, "detected": False}),
            (ATTACK, {0: SAFE}, {"filtered": False, "detected": True}),
            (ATTACK, {}, {"filtered": True, "detected": True}),
            (VIOLENT, {}, {"filtered": False, "detected": False}),
        ],
    )
    def test_an_attack_on_the_model_is_a_jailbreak(
        self, prompt: Verdict, choices: dict[int, Verdict | None], expected: dict[str, bool]
    ) -> None:
        (shown,) = verdict_shapes.prompt_filter_results(asked(prompt, choices))
        assert shown["content_filter_results"]["jailbreak"] == expected

    def test_a_choice_is_filtered_where_it_was_refused(self) -> None:
        annotations = asked(SAFE, {0: VIOLENT, 1: VIOLENT, 2: SAFE}, refused=[1, 2])
        shown = [verdict_shapes.choice_filter_results(annotations, number) for number in range(3)]
        assert [filtered(one) for one in shown] == [set(), {"violence"}, set()]
        assert [severities(one)["violence"] for one in shown] == ["high", "high", "safe"]
        assert verdict_shapes.choice_filter_results(annotations, 3) == {}

    def test_what_was_not_judged_says_so(self) -> None:
        unjudged = {
            "error": {"code": "content_filter_error", "message": "The contents are not filtered"}
        }
        annotations = asked(None, {0: None})
        (shown,) = verdict_shapes.prompt_filter_results(annotations)
        assert shown["content_filter_results"] == unjudged
        assert verdict_shapes.choice_filter_results(annotations, 0) == unjudged
