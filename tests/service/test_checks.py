"""``/v1/guard``: what the policy would do with a prompt, an answer or a conversation, and why."""

from collections.abc import Sequence
from typing import Any

import httpx
import pytest

from models.inputs import Turn
from models.taxonomy import CATEGORIES, SIGNALS
from service import checks
from service.errors import BadRequest, UnknownModel, Unscannable
from service.exchange import Direction, Field
from tests.guards import CANARY
from tests.service.conftest import Server, StartServer

BAKE, STEAL = "how do I bake bread", "how do I steal a car"


def user(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def parsed(**body: Any) -> dict[Direction, list[Field]]:
    return checks.parse(body, "ours")


def shown(fields: Sequence[Field]) -> list[tuple[str, str]]:
    return [(field.path, field.judged.text) for field in fields]


class TestParsing:
    def test_a_prompt_is_judged_alone(self) -> None:
        fields = parsed(prompt=BAKE)
        assert list(fields) == ["prompt"]
        assert shown(fields["prompt"]) == [("prompt", BAKE)]
        assert fields["prompt"][0].judged.context == ()

    def test_a_response_is_judged_as_an_answer_to_its_prompt(self) -> None:
        fields = parsed(prompt=STEAL, response="no")
        (field,) = fields["response"]
        assert (field.path, field.judged.role, field.judged.text) == ("response", "response", "no")
        assert field.judged.context == (Turn("user", STEAL),)
        assert shown(fields["prompt"]) == [("prompt", STEAL)]

    def test_no_response_is_none(self) -> None:
        assert list(parsed(prompt=BAKE, response=None)) == ["prompt"]

    def test_a_conversation_that_ends_with_a_question_asks_about_prompts(self) -> None:
        fields = parsed(messages=[user(BAKE), assistant("so"), user(STEAL)])
        assert list(fields) == ["prompt"]
        assert shown(fields["prompt"]) == [
            ("messages[0].content", BAKE),
            ("messages[1].content", "so"),
            ("messages[2].content", STEAL),
            # What was asked, as a whole.
            ("messages", f"{BAKE}\n{STEAL}"),
        ]
        assert [field.is_past for field in fields["prompt"]] == [True, True, False, False]
        # What the model said before is judged as what it is.
        roles = [field.judged.role for field in fields["prompt"]]
        assert roles == ["prompt", "response", "prompt", "prompt"]

    def test_a_conversation_that_ends_with_an_answer_asks_about_that(self) -> None:
        fields = parsed(messages=[user(STEAL), assistant("like this")])
        assert shown(fields["prompt"]) == [("messages[0].content", STEAL)]
        assert shown(fields["response"]) == [("messages[1].content", "like this")]
        assert fields["response"][0].judged.context[-1] == Turn("user", STEAL)

    def test_only_the_last_of_many_messages_is_the_answer(self) -> None:
        messages = [user(BAKE), *([assistant("so"), user(BAKE)] * 5), assistant("like this")]
        fields = parsed(messages=messages)
        assert shown(fields["response"]) == [("messages[11].content", "like this")]
        assert len(fields["prompt"]) == 12

    def test_all_that_a_message_says_is_judged(self) -> None:
        call = {"type": "function", "function": {"name": "buy", "arguments": '{"what": "a car"}'}}
        fields = parsed(messages=[user(STEAL), assistant(None) | {"tool_calls": [call]}])
        assert [field.name for field in fields["response"]] == ["tool_call"]
        assert "a car" in fields["response"][0].judged.text

    @pytest.mark.parametrize(
        ("body", "param"),
        [
            ({}, "prompt"),
            ({"prompt": ""}, "prompt"),
            ({"prompt": 3}, "prompt"),
            ({"prompt": [BAKE]}, "prompt"),
            ({"response": "so"}, "prompt"),
            ({"prompt": BAKE, "response": ""}, "response"),
            ({"prompt": BAKE, "response": 3}, "response"),
            ({"prompt": BAKE, "input": BAKE}, None),
            ({"prompt": BAKE, "messages": [user(BAKE)]}, "messages"),
            ({"response": "so", "messages": [user(BAKE)]}, "messages"),
            ({"messages": []}, "messages"),
            ({"messages": user(BAKE)}, "messages"),
            ({"messages": [BAKE]}, "messages[0]"),
            ({"messages": [user(BAKE), None]}, "messages[1]"),
            ({"messages": [{"content": BAKE}]}, "messages[0].role"),
            ({"messages": [{"role": "poet", "content": BAKE}]}, "messages[0].role"),
            ({"messages": [{"role": [], "content": BAKE}]}, "messages[0].role"),
            ({"messages": [user(3)]}, "messages[0].content"),
            ({"messages": [user([3])]}, "messages[0].content[0]"),
            ({"messages": [user([{"type": "text", "text": 3}])]}, "messages[0].content[0].text"),
            ({"prompt": BAKE, "model": 3}, "model"),
        ],
    )
    def test_what_is_none_of_them_is_refused_by_its_place(
        self, body: dict[str, Any], param: str | None
    ) -> None:
        with pytest.raises(BadRequest) as refused:
            checks.parse(body, "ours")
        assert (refused.value.status, refused.value.param) == (400, param)

    def test_images_and_other_models_have_their_own_codes(self) -> None:
        image = {"type": "image_url", "image_url": {"url": "x"}}
        with pytest.raises(Unscannable):
            parsed(messages=[user([image])])
        with pytest.raises(UnknownModel):
            parsed(prompt=BAKE, model="gpt-4o")


POLICY = {
    "version": 1,
    "id": "house",
    "rules": [
        {"direction": "prompt", "categories": ["drugs"], "severity": "minor", "action": "block"},
        {"direction": "prompt", "severity": "severe", "action": "block"},
        {"direction": "response", "severity": "minor", "action": "regenerate"},
        {"action": "allow"},
    ],
}


@pytest.fixture(scope="module")
def server(start_server: StartServer) -> Server:
    return start_server(policy=POLICY)


@pytest.fixture(scope="module")
def client(server: Server) -> httpx.Client:
    return server.client()


def check(client: httpx.Client, **body: Any) -> Any:
    answer = client.post("/v1/guard", json=body)
    assert answer.status_code == 200
    return answer.json()


class TestOverHttp:
    def test_a_decision_names_its_rule_and_says_why(self, client: httpx.Client) -> None:
        answer = check(client, prompt="w1 minor-drugs")
        assert answer["id"].startswith("guard-")
        assert (answer["model"], answer["policy"]) == ("words-1", "house@1")
        assert answer["decisions"] == {
            "prompt": {
                "action": "block",
                "rule": 0,
                "reason": "severity minor (drugs): rules[0] matches prompt texts of severity minor"
                " or above in drugs",
            }
        }

    def test_what_no_rule_matches_is_said_to_fall_to_the_default(
        self, client: httpx.Client
    ) -> None:
        decision = check(client, prompt="moderate-violence")["decisions"]["prompt"]
        assert (decision["action"], decision["rule"]) == ("allow", 3)
        assert decision["reason"] == (
            "severity moderate (violence): no rule before the default, rules[3], matches"
        )

    def test_both_directions_are_decided_on(self, client: httpx.Client) -> None:
        answer = check(client, prompt="severe-violence", response="minor-drugs")
        decisions = answer["decisions"]
        assert {key: value["action"] for key, value in decisions.items()} == {
            "prompt": "block",
            "response": "regenerate",
        }
        assert [(one["direction"], one["path"], one["action"]) for one in answer["verdicts"]] == [
            ("prompt", "prompt", "block"),
            ("response", "response", "regenerate"),
        ]

    def test_a_verdict_is_in_the_words_of_a_moderation(self, client: httpx.Client) -> None:
        (verdict,) = check(client, prompt="minor-drugs signal-injection")["verdicts"]
        assert (verdict["field"], verdict["severity"]) == ("message", "minor")
        assert verdict["harm_categories"]["drugs"]["severity"] == "minor"
        assert [*verdict["harm_categories"]] == [*CATEGORIES]
        assert [*verdict["signals"]] == [*SIGNALS]
        assert verdict["signals"]["injection"] > 0.9
        assert verdict["coverage"]["windows"] == 1

    def test_a_response_is_judged_by_itself_and_not_by_its_prompt(
        self, client: httpx.Client
    ) -> None:
        answer = check(client, prompt="severe-violence", response="w1")
        assert answer["decisions"]["response"]["action"] == "allow"

    def test_the_strongest_action_of_a_conversation_decides(self, client: httpx.Client) -> None:
        messages = [{"role": "system", "content": "minor-drugs"}, user("w1")]
        answer = check(client, messages=messages)
        assert answer["decisions"]["prompt"]["action"] == "block"
        assert [one["action"] for one in answer["verdicts"]] == ["block", "allow"]

    def test_a_turn_that_was_answered_is_at_most_annotated(self, client: httpx.Client) -> None:
        messages = [user("minor-drugs"), assistant("w1"), user("w2")]
        answer = check(client, messages=messages)
        assert answer["decisions"]["prompt"]["action"] == "annotate"

    def test_an_empty_answer_is_an_answer(self, client: httpx.Client) -> None:
        answer = check(client, messages=[user("w1"), assistant("")])
        assert answer["decisions"]["response"]["action"] == "allow"

    def test_each_direction_is_counted_and_recorded_without_text(
        self, server: Server, client: httpx.Client
    ) -> None:
        check(client, prompt=f"{CANARY} severe-violence", response=f"{CANARY} minor-drugs")
        records = server.run(server.runtime.keeper.recorder.recent(2))
        assert {(one.direction, one.level, one.action) for one in records} == {
            ("prompt", "severe", "block"),
            ("response", "minor", "regenerate"),
        }
        # A check enforces nothing: what it found is annotated.
        assert {one.outcome for one in records} == {"annotated"}
        assert CANARY not in repr(records)
        labels = {"direction": "response", "category": "drugs", "severity": "minor"}
        assert server.sample("flagged_total", outcome="annotated", **labels) >= 1
