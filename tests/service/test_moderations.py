"""``/v1/moderations``: OpenAI's shape, read by OpenAI's own client, with severity beside."""

from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai.types import Moderation, ModerationTextInputParam

from models import taxonomy
from models.taxonomy import CATEGORIES, SIGNALS
from models.verdict import Coverage, Verdict
from service import moderations
from service.errors import BadRequest, TooLarge, UnknownModel, Unscannable
from tests.guards import CANARY
from tests.service.conftest import Server, StartServer

IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}


def texts(value: Any, most: int = 100) -> list[str]:
    """The texts that a body with this input asks about."""
    return [field.judged.text for field in moderations.parse({"input": value}, "ours", most)]


def part(text: Any) -> dict[str, Any]:
    return {"type": "text", "text": text}


class TestParsing:
    @pytest.mark.parametrize(
        ("value", "asked"),
        [
            ("a", ["a"]),
            (["a"], ["a"]),
            (["a", "b", "a"], ["a", "b", "a"]),
            ([part("a")], ["a"]),
            ([part("a"), part("b")], ["a\nb"]),
            (" ", [" "]),
        ],
    )
    def test_a_string_or_an_array_of_parts_is_one_text_and_an_array_of_strings_many(
        self, value: Any, asked: list[str]
    ) -> None:
        assert texts(value) == asked

    @pytest.mark.parametrize(
        ("value", "param"),
        [
            (None, "input"),
            (3, "input"),
            ({}, "input"),
            (True, "input"),
            ([], "input"),
            ("", "input"),
            ([""], "input[0]"),
            (["a", ""], "input[1]"),
            (["a", 3], "input[1]"),
            ([None], "input[0]"),
            ([["a"]], "input[0]"),
            ([[1, 2]], "input[0]"),
            (["a", part("b")], "input[1]"),
            ([part("a"), "b"], "input[1]"),
            ([part("")], "input[0].text"),
            ([part(None)], "input[0].text"),
            ([{"type": "text"}], "input[0].text"),
            ([{}], "input[0].type"),
            ([{"type": "audio", "text": "a"}], "input[0].type"),
            ([{"type": ["text"]}], "input[0].type"),
        ],
    )
    def test_what_is_neither_is_refused_by_its_place(self, value: Any, param: str) -> None:
        with pytest.raises(BadRequest) as refused:
            texts(value)
        assert (refused.value.status, refused.value.param) == (400, param)
        assert param.split(".")[0] in refused.value.message

    def test_the_input_must_be_there(self) -> None:
        with pytest.raises(BadRequest, match="input is missing"):
            moderations.parse({"text": "a"}, "ours", 1)

    def test_images_are_refused_as_what_no_guard_judges(self) -> None:
        with pytest.raises(Unscannable) as refused:
            texts([part("a"), IMAGE])
        assert (refused.value.code, refused.value.param) == ("unscannable", "input[1]")

    def test_more_inputs_than_one_request_may_hold_are_refused(self) -> None:
        assert len(texts(["a"] * 5, most=5)) == 5
        with pytest.raises(TooLarge, match="6 inputs are over the 5") as refused:
            texts(["a"] * 6, most=5)
        assert refused.value.code == "too_many_inputs"

    @pytest.mark.parametrize(
        "model",
        [
            None,
            "ours",
            "omni-moderation-latest",
            "omni-moderation-2024-09-26",
            "text-moderation-latest",
            "text-moderation-stable",
            "text-moderation-007",
        ],
    )
    def test_a_model_is_ours_or_an_alias(self, model: str | None) -> None:
        moderations.check_model(model, "ours")

    @pytest.mark.parametrize(
        "model",
        [
            "",
            "Ours",
            "gpt-4o",
            "omni-moderation-",
            "xomni-moderation-latest",
            "omni-moderation-a b",
        ],
    )
    def test_another_model_is_not_here(self, model: str) -> None:
        with pytest.raises(UnknownModel, match="ours") as refused:
            moderations.check_model(model, "ours")
        assert (refused.value.status, refused.value.code) == (404, "model_not_found")

    @pytest.mark.parametrize("model", [3, ["ours"], {}, False])
    def test_a_model_is_a_string(self, model: object) -> None:
        with pytest.raises(BadRequest, match="model must be a string") as refused:
            moderations.check_model(model, "ours")
        assert refused.value.status == 400


def verdict(at_least: tuple[float, float, float] = (0, 0, 0), **scores: float) -> Verdict:
    assert scores.keys() <= {*CATEGORIES, *SIGNALS}
    return Verdict(
        "prompt",
        at_least,
        tuple(scores.get(name, 0.0) for name in CATEGORIES),
        tuple(scores.get(name, 0.0) for name in SIGNALS),
        Coverage(7, 9, 2),
    )


def flags(found: Verdict) -> set[str]:
    """The keys of OpenAI's that hold; ``flagged`` must say whether there is any reason to."""
    shown = moderations.result(found)
    held = {key for key, value in shown["categories"].items() if value}
    assert shown["flagged"] is bool(held or found.level)
    return held


MILD, GRAVE = (0.9, 0.1, 0.1), (0.9, 0.9, 0.9)


class TestRendering:
    def test_scores_are_those_of_the_taxonomys_expressions(self) -> None:
        found = verdict(MILD, violence=0.75, insulting_behavior=0.25, minors=0.5)
        shown = moderations.result(found)
        assert list(shown["category_scores"]) == list(shown["categories"]) == [*taxonomy.OPENAI]
        for key, expression in taxonomy.OPENAI.items():
            assert shown["category_scores"][key] == taxonomy.evaluate(expression, found.scores())
        assert shown["category_applied_input_types"] == {key: ["text"] for key in taxonomy.OPENAI}

    @pytest.mark.parametrize(
        ("found", "held"),
        [
            (verdict(), set()),
            (verdict(MILD), set()),
            (verdict(MILD, drugs=0.5), {"illicit"}),
            (verdict(MILD, drugs=0.49), set()),
            (verdict(MILD, violence=0.9), {"violence"}),
            (verdict(GRAVE, violence=0.9), {"violence", "violence/graphic"}),
            (
                verdict(MILD, violence=0.9, insulting_behavior=0.9),
                {"violence", "harassment", "harassment/threatening"},
            ),
            # A category does not fire where the level is none.
            (verdict((0.4, 0.1, 0), violence=0.9), set()),
            # A person who seeks help does no harm, and is shown all the same.
            (verdict(self_harm=0.9), {"self-harm", "self-harm/intent"}),
            (verdict(self_harm=0.9, psychological_harm=0.9), {"self-harm", "self-harm/intent"}),
            (
                verdict(MILD, self_harm=0.9, psychological_harm=0.9),
                {"self-harm", "self-harm/intent", "self-harm/instructions"},
            ),
            (verdict(minors=0.5), {"sexual/minors"}),
            # Neither is among OpenAI's keys.
            (verdict(refusal=0.9, injection=0.9), set()),
        ],
    )
    def test_keys_hold_at_the_operating_point(self, found: Verdict, held: set[str]) -> None:
        assert flags(found) == held

    def test_our_own_words_stand_beside(self) -> None:
        shown = moderations.result(verdict((0.9, 0.6, 0.3), violence=0.9, drugs=0.4, injection=0.7))
        assert (shown["severity"], shown["severity_score"]) == ("moderate", 0.6)
        assert shown["harm_categories"]["violence"] == {"score": 0.9, "severity": "moderate"}
        assert shown["harm_categories"]["drugs"] == {"score": 0.4, "severity": "none"}
        assert [*shown["harm_categories"]] == [*CATEGORIES]
        assert shown["signals"] == {
            "refusal": 0, "injection": 0.7, "self_harm": 0, "minors": 0,
        }  # fmt: skip
        assert shown["coverage"] == {
            "characters": {"judged": 7, "total": 9},
            "windows": 2,
            "images": {"judged": 0, "total": 0},
        }

    def test_an_answer_names_the_guard_and_holds_a_result_a_verdict(self) -> None:
        shown = moderations.render("id1", "ours", [verdict(), verdict(MILD)])
        assert (shown["id"], shown["model"]) == ("modr-id1", "ours")
        assert [result["flagged"] for result in shown["results"]] == [False, True]


@pytest.fixture(scope="module")
def server(start_server: StartServer) -> Server:
    return start_server(inputs_per_request=20)


@pytest.fixture(scope="module")
def sdk(server: Server) -> Iterator[openai.OpenAI]:
    """The stock client, as a user configures it."""
    with openai.OpenAI(
        base_url=f"{server.url}/v1",
        api_key="unused",
        max_retries=0,
        http_client=openai.DefaultHttpxClient(trust_env=False, timeout=20),
    ) as made:
        yield made


def severity(result: Moderation) -> Any:
    """An additional field, which the client keeps as it came."""
    assert result.model_extra is not None
    return result.model_extra["severity"]


class TestOverHttp:
    def test_a_string_gives_one_typed_result(self, sdk: openai.OpenAI) -> None:
        answer = sdk.moderations.create(input="this is severe-violence")
        assert answer.id.startswith("modr-")
        assert answer.model == "words-1"
        (result,) = answer.results
        assert result.flagged
        assert result.categories.violence
        assert result.categories.violence_graphic
        assert not result.categories.hate_threatening
        assert result.category_scores.violence > 0.99
        assert result.category_scores.self_harm_intent < 0.01
        assert result.category_applied_input_types.violence == ["text"]

    def test_our_fields_reach_the_clients_program(self, sdk: openai.OpenAI) -> None:
        (result,) = sdk.moderations.create(input="w1 moderate-drugs").results
        extra = result.model_extra
        assert extra is not None
        assert extra["severity"] == "moderate"
        assert extra["severity_score"] == pytest.approx(2 / 3, abs=0.01)
        assert extra["harm_categories"]["drugs"]["severity"] == "moderate"
        assert extra["harm_categories"]["violence"]["severity"] == "none"
        assert extra["coverage"]["characters"] == {"judged": 17, "total": 17}

    def test_strings_give_a_result_each_in_their_order(self, sdk: openai.OpenAI) -> None:
        asked = ["w1", "severe-violence", "minor-drugs", "w1"]
        results = sdk.moderations.create(input=asked).results
        assert [severity(result) for result in results] == ["none", "severe", "minor", "none"]

    def test_parts_give_one_result_for_all_of_them(self, sdk: openai.OpenAI) -> None:
        (result,) = sdk.moderations.create(
            input=[
                ModerationTextInputParam(type="text", text="w1"),
                ModerationTextInputParam(type="text", text="minor-drugs"),
            ]
        ).results
        assert severity(result) == "minor"

    @pytest.mark.parametrize("model", ["omni-moderation-latest", "text-moderation-stable"])
    def test_openais_model_names_are_aliases(self, sdk: openai.OpenAI, model: str) -> None:
        assert sdk.moderations.create(input="w1", model=model).model == "words-1"

    def test_a_person_who_seeks_help_is_flagged_without_being_harmful(
        self, sdk: openai.OpenAI
    ) -> None:
        (result,) = sdk.moderations.create(input="signal-self_harm").results
        assert result.flagged
        assert result.categories.self_harm
        assert severity(result) == "none"

    @pytest.mark.parametrize(
        ("request_", "error", "code", "param"),
        [
            ({"input": ""}, openai.BadRequestError, "invalid_request", "input"),
            ({"input": []}, openai.BadRequestError, "invalid_request", "input"),
            ({"input": [IMAGE]}, openai.BadRequestError, "unscannable", "input[0]"),
            ({"input": CANARY, "model": CANARY}, openai.NotFoundError, "model_not_found", "model"),
            (
                {"input": [CANARY] * 21},
                openai.APIStatusError,
                "too_many_inputs",
                "input",
            ),
        ],
    )
    def test_errors_are_the_clients_own_with_their_code(
        self,
        sdk: openai.OpenAI,
        request_: dict[str, Any],
        error: type[openai.APIStatusError],
        code: str,
        param: str,
    ) -> None:
        with pytest.raises(error) as refused:
            sdk.moderations.create(**request_)
        assert (refused.value.code, refused.value.param) == (code, param)
        assert refused.value.request_id
        assert CANARY not in str(refused.value)

    def test_a_million_characters_are_judged_to_their_end(self, sdk: openai.OpenAI) -> None:
        long = "w1 " * 333_329 + "severe-violence"
        assert len(long) > 1_000_000
        (result,) = sdk.moderations.create(input=long).results
        assert severity(result) == "severe"
        assert result.model_extra is not None
        coverage = result.model_extra["coverage"]
        assert coverage["characters"] == {"judged": len(long), "total": len(long)}
        assert coverage["windows"] > 1000

    def test_a_check_is_counted_and_recorded_without_its_text(
        self, server: Server, sdk: openai.OpenAI
    ) -> None:
        before = server.sample("outcomes_total", direction="prompt", outcome="annotated")
        sdk.moderations.create(input=f"{CANARY} severe-violence")
        after = server.sample("outcomes_total", direction="prompt", outcome="annotated")
        assert after == before + 1
        (record,) = server.run(server.runtime.keeper.recorder.recent(1))
        assert (record.route, record.level) == ("/v1/moderations", "severe")
        assert CANARY not in repr(record)
