"""Azure AI Content Safety's wire: what is asked, on which scale it is answered, how it refuses."""

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.taxonomy import AZURE_SEVERITY, CATEGORIES, SIGNALS, Severity
from models.verdict import Coverage, Verdict
from service import azure_content_safety as azure
from service.errors import (
    BadRequest,
    GuardUnavailable,
    NotFound,
    Overloaded,
    SluicegateError,
    TooLarge,
)
from service.judgement import Judgement
from service.policy import Policy
from tests.guards import CANARY
from tests.service.rig import Rig

NAMES = ["Hate", "SelfHarm", "Sexual", "Violence"]


def verdict(at_least: tuple[float, float, float], *fired: str) -> Verdict:
    assert set(fired) <= {*CATEGORIES, *SIGNALS}
    return Verdict(
        "prompt",
        at_least,
        tuple(0.8 if name in fired else 0.1 for name in CATEGORIES),
        tuple(0.8 if name in fired else 0.1 for name in SIGNALS),
        Coverage(1, 1, 1),
    )


def severities(answer: dict[str, Any]) -> dict[str, int]:
    return {one["category"]: one["severity"] for one in answer["categoriesAnalysis"]}


async def analyzed(rig: Rig, **body: Any) -> dict[str, int]:
    asked = azure.parse_analyze(body)
    (judgement,) = await rig.runtime.judge.judge(Policy(), "prompt", asked.fields)
    answer = azure.render_analyze(asked, judgement.decision.verdict)
    assert answer["blocklistsMatch"] == []
    return severities(answer)


class TestAnalyzing:
    @pytest.mark.parametrize(
        ("text", "found"),
        [
            ("hello", {}),
            ("minor-insulting_behavior", {"Hate": 2}),
            ("moderate-discriminatory_behavior", {"Hate": 4}),
            ("severe-sexual_content", {"Sexual": 6}),
            ("severe-violence minor-insulting_behavior", {"Violence": 6, "Hate": 6}),
            ("severe-drugs", {}),
            ("minor-drugs signal-self_harm", {"SelfHarm": 2}),
            ("signal-self_harm", {}),
        ],
    )
    async def test_each_category_has_a_severity(
        self, rig: Rig, text: str, found: dict[str, int]
    ) -> None:
        answer = await analyzed(rig, text=text)
        assert list(answer) == NAMES
        assert answer == dict.fromkeys(NAMES, 0) | found

    @pytest.mark.parametrize(
        ("asked", "answered"),
        [
            (None, NAMES),
            ([], NAMES),
            (["Violence", "Hate"], ["Hate", "Violence"]),
            (["Sexual", "Sexual"], ["Sexual"]),
        ],
    )
    async def test_only_the_categories_that_are_asked_for_are_told(
        self, rig: Rig, asked: list[str] | None, answered: list[str]
    ) -> None:
        assert list(await analyzed(rig, text="hello", categories=asked)) == answered

    async def test_a_text_of_any_length_is_judged_to_its_end(self, rig: Rig) -> None:
        answer = await analyzed(rig, text="w1 " * 10_000 + "severe-violence")
        assert answer["Violence"] == 6

    async def test_the_options_that_ask_for_nothing_are_taken(self, rig: Rig) -> None:
        answer = await analyzed(
            rig,
            text="minor-violence",
            blocklistNames=[],
            haltOnBlocklistHit=True,
            outputType="FourSeverityLevels",
        )
        assert answer["Violence"] == 2

    @pytest.mark.parametrize(
        ("body", "param"),
        [
            ({}, "text"),
            ({"text": None}, "text"),
            ({"text": ""}, "text"),
            ({"text": ["hello"]}, "text"),
            ({"text": "a", "categories": "Hate"}, "categories"),
            ({"text": "a", "categories": ["hate"]}, "categories[0]"),
            ({"text": "a", "categories": ["Hate", 3]}, "categories[1]"),
            ({"text": "a", "categories": ["Hate", []]}, "categories[1]"),
            ({"text": "a", "blocklistNames": ["mine"]}, "blocklistNames"),
            ({"text": "a", "blocklistNames": "mine"}, "blocklistNames"),
            ({"text": "a", "haltOnBlocklistHit": "yes"}, "haltOnBlocklistHit"),
            ({"text": "a", "outputType": "SixSeverityLevels"}, "outputType"),
            ({"text": "a", "outputType": []}, "outputType"),
            ({"text": "a", CANARY: "b"}, None),
        ],
    )
    def test_what_is_wrong_is_named(self, body: dict[str, Any], param: str | None) -> None:
        with pytest.raises(BadRequest) as refused:
            azure.parse_analyze(body)
        assert refused.value.param == param
        assert CANARY not in refused.value.message


def levels(at_least: tuple[float, float, float], kind: str, *fired: str) -> dict[str, int]:
    asked = azure.parse_analyze({"text": "a", "outputType": kind})
    return severities(azure.render_analyze(asked, verdict(at_least, *fired)))


probabilities = st.tuples(*[st.floats(0, 1)] * 3).map(
    lambda three: tuple(sorted(three, reverse=True))
)


class TestScales:
    @pytest.mark.parametrize(
        ("at_least", "number"),
        [
            ((0.0, 0.0, 0.0), 0),
            ((0.49, 0.1, 0.0), 0),
            ((0.49, 0.3, 0.1), 1),
            ((0.6, 0.1, 0.0), 2),
            ((1.0, 0.3, 0.0), 3),
            ((0.7, 0.6, 0.1), 4),
            ((1.0, 0.9, 0.1), 5),
            ((0.6, 0.6, 0.6), 6),
            ((1.0, 0.9, 0.8), 7),
        ],
    )
    def test_each_of_the_eight_numbers_is_given(
        self, at_least: tuple[float, float, float], number: int
    ) -> None:
        found = levels(at_least, "EightSeverityLevels", "violence")
        # What does not fire is 0 on either scale.
        assert found == dict.fromkeys(NAMES, 0) | {"Violence": number}

    @given(probabilities)
    def test_eight_fold_into_four_as_azures_do(self, at_least: tuple[float, float, float]) -> None:
        eight = levels(at_least, "EightSeverityLevels", "violence")["Violence"]
        four = levels(at_least, "FourSeverityLevels", "violence")["Violence"]
        assert four == eight - eight % 2
        assert four == AZURE_SEVERITY[verdict(at_least).level][1]

    @given(probabilities, probabilities)
    def test_within_a_level_a_graver_text_has_no_lower_number(
        self, one: tuple[float, float, float], other: tuple[float, float, float]
    ) -> None:
        first, second = verdict(one), verdict(other)
        if first.level == second.level and first.severity_score <= second.severity_score:
            kind = "EightSeverityLevels"
            assert (
                levels(one, kind, "violence")["Violence"]
                <= levels(other, kind, "violence")["Violence"]
            )

    @pytest.mark.parametrize("level", list(Severity))
    def test_both_numbers_of_a_level_lie_within_its_scores(self, level: Severity) -> None:
        # The least and the greatest probabilities of a level: see the module's docstring.
        least = (0.5,) * level + (0.0,) * (3 - level)
        most = (1.0,) * level + (0.499,) * (3 - level)
        numbers = [
            levels((one[0], one[1], one[2]), "EightSeverityLevels", "violence")["Violence"]
            for one in (least, most)
        ]
        assert numbers == [2 * level, 2 * level + 1]


async def shielded(rig: Rig, **body: Any) -> dict[str, Any]:
    asked = azure.parse_shield(body)
    judgements: Sequence[Judgement] = await rig.runtime.judge.judge(
        Policy(), "prompt", asked.fields
    )
    return azure.render_shield(asked, judgements)


class TestShielding:
    @pytest.mark.parametrize(
        ("text", "attacks"),
        [
            ("hello", False),
            ("signal-injection", True),
            # Harm is no attack on the model, and an attack need do no harm.
            ("severe-violence", False),
            ("severe-violence signal-injection", True),
        ],
    )
    async def test_an_attack_is_what_the_guard_takes_for_one(
        self, rig: Rig, text: str, attacks: bool
    ) -> None:
        answer = await shielded(rig, userPrompt=text, documents=["hello", text])
        assert answer == {
            "userPromptAnalysis": {"attackDetected": attacks},
            "documentsAnalysis": [{"attackDetected": False}, {"attackDetected": attacks}],
        }

    async def test_what_was_not_sent_is_not_told_of(self, rig: Rig) -> None:
        assert await shielded(rig, userPrompt="signal-injection") == {
            "userPromptAnalysis": {"attackDetected": True},
            "documentsAnalysis": [],
        }
        assert await shielded(rig, documents=["signal-injection"]) == {
            "documentsAnalysis": [{"attackDetected": True}]
        }

    async def test_blank_ones_keep_the_places_of_the_others(self, rig: Rig) -> None:
        answer = await shielded(rig, userPrompt="", documents=["", " ", "signal-injection"])
        assert answer["userPromptAnalysis"] == {"attackDetected": False}
        assert [one["attackDetected"] for one in answer["documentsAnalysis"]] == [
            False,
            False,
            True,
        ]

    @pytest.mark.parametrize(
        ("body", "param"),
        [
            ({}, "userPrompt"),
            ({"userPrompt": None, "documents": None}, "userPrompt"),
            ({"userPrompt": 3}, "userPrompt"),
            ({"documents": "hello"}, "documents"),
            ({"documents": ["a", None]}, "documents[1]"),
            ({"userPrompt": "a", CANARY: "b"}, None),
        ],
    )
    def test_what_is_wrong_is_named(self, body: dict[str, Any], param: str | None) -> None:
        with pytest.raises(BadRequest) as refused:
            azure.parse_shield(body)
        assert refused.value.param == param
        assert CANARY not in refused.value.message


class TestErrors:
    @pytest.mark.parametrize(
        ("error", "code"),
        [
            (BadRequest("m", param="text"), "InvalidRequestBody"),
            (TooLarge("m"), "InvalidRequestBody"),
            (NotFound("m"), "NotFound"),
            (Overloaded("m"), "TooManyRequests"),
            (GuardUnavailable("m"), "ServerBusy"),
            (SluicegateError("m"), "InternalError"),
        ],
    )
    def test_they_are_in_azures_words_with_ours_inside(
        self, error: SluicegateError, code: str
    ) -> None:
        (shown,) = azure.error_body(error, "id1").values()
        assert (shown["code"], shown["message"]) == (code, "m")
        assert shown.get("target") == error.param
        assert shown["innererror"] == {"code": error.code}


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.sampled_from(NAMES),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)
keys = st.sampled_from([*azure.ANALYZE_SCHEMA["properties"], *azure.SHIELD_SCHEMA["properties"]])


@given(st.dictionaries(keys, json_values))
def test_any_object_is_read_or_refused(body: dict[str, Any]) -> None:
    for parse in (azure.parse_analyze, azure.parse_shield):
        try:
            asked = parse(body)
        except BadRequest:
            continue
        texts = [body.get("text"), body.get("userPrompt"), *(body.get("documents") or [])]
        assert [one.judged.text for one in asked.fields] == [
            text for text in texts if text and (text == body.get("text") or not text.isspace())
        ]
