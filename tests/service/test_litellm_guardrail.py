"""LiteLLM's generic guardrail: what is judged of its request, and what it is told."""

from collections.abc import AsyncIterator, Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.inputs import Turn
from models.taxonomy import Severity
from service import litellm_guardrail
from service.body import strings
from service.errors import BadRequest, SluicegateError, Unscannable
from service.exchange import Direction, Field
from service.judgement import FieldJudge, prevailing
from service.policy import Action, Policy, Rule
from tests.guards import CANARY
from tests.service.rig import MakeRig, Rig

# What LiteLLM adds to each call, as its request model dumps it.
AROUND: Mapping[str, Any] = {
    "litellm_call_id": "c0a8-1",
    "litellm_trace_id": None,
    "litellm_version": "1.80.0",
    "request_data": {"user_api_key_hash": "88dc28d0", "user_api_key_end_user_id": "somebody"},
    "request_headers": {"user-agent": "OpenAI/Python 3.57", "authorization": "[present]"},
    "additional_provider_specific_params": {"a note": "of the operator's"},
    "images": None,
    "tools": None,
    "structured_messages": None,
    "tool_calls": None,
    "texts": None,
    "model": "gpt-4o",
}
BUY = {"type": "function", "id": "1", "function": {"name": "buy", "arguments": '{"what": "a car"}'}}


def parsed(kind: str = "request", **body: Any) -> dict[Direction, list[Field]]:
    return litellm_guardrail.parse({**AROUND, "input_type": kind, **body})


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def shown(fields: list[Field]) -> list[tuple[str, str, str, str]]:
    return [(one.name, one.path, one.judged.role, one.judged.text) for one in fields]


class TestRequests:
    def test_texts_are_prompts(self) -> None:
        fields = parsed(texts=["hello", " ", "", "there"])
        assert list(fields) == ["prompt"]
        assert shown(fields["prompt"]) == [
            ("message", "texts[0]", "prompt", "hello"),
            ("message", "texts[3]", "prompt", "there"),
        ]

    def test_what_it_says_of_the_call_is_not_judged(self) -> None:
        assert parsed() == {"prompt": []}

    def test_messages_are_judged_in_their_turn_and_their_texts_not_again(self) -> None:
        messages = [
            {"role": "system", "content": "be kind"},
            user("an old question"),
            assistant("an old answer", tool_calls=[BUY]),
            user([{"type": "text", "text": "new"}, {"type": "text", "text": "parts"}]),
        ]
        texts = ["be kind", "an old question", "an old answer", "new", "parts"]
        all_fields = parsed(structured_messages=messages, texts=texts, tool_calls=[BUY])["prompt"]
        fields = [field for field in all_fields if not field.is_joint]
        assert shown(fields) == [
            ("system", "structured_messages[0].content", "prompt", "be kind"),
            ("message", "structured_messages[1].content", "prompt", "an old question"),
            ("text", "structured_messages[2].content", "response", "an old answer"),
            ("tool_call", "structured_messages[2].tool_calls[0]", "response", "buy\nwhat\na car"),
            ("message", "structured_messages[3].content", "prompt", "new\nparts"),
        ]
        assert [one.is_past for one in fields] == [False, True, True, True, False]

    def test_a_text_that_no_message_holds_is_judged_beside_them(self) -> None:
        fields = parsed(structured_messages=[user("hello there")], texts=["hello", "hello there"])
        assert shown(fields["prompt"])[1:] == [("message", "texts[0]", "prompt", "hello")]

    def test_a_call_that_no_message_holds_is_judged_beside_them(self) -> None:
        fields = parsed(structured_messages=[user("hello")], tool_calls=[BUY])
        assert shown(fields["prompt"])[1:] == [
            ("tool_call", "tool_calls[0]", "response", "buy\nwhat\na car")
        ]

    @pytest.mark.parametrize(
        "tool",
        [
            {"type": "function", "function": {"name": "buy", "description": "buys a car"}},
            {"type": "code_interpreter", "container": {"type": "auto", "note": "buys a car"}},
            {"type": "file_search", "filters": {"key": "x", "value": "buys a car"}},
            {"type": "mcp", "server_description": "buys a car"},
        ],
    )
    def test_any_tool_is_a_definition(self, tool: dict[str, Any]) -> None:
        (field,) = parsed(tools=[tool])["prompt"]
        assert (field.name, field.path) == ("tool_definition", "tools[0]")
        assert "buys a car" in field.judged.text

    def test_a_key_that_is_new_is_judged(self) -> None:
        (field,) = parsed(citations=[{"quote": "a new thing"}])["prompt"]
        assert (field.name, field.judged.text) == ("other", "quote\na new thing")


class TestResponses:
    def test_texts_and_calls_are_answers(self) -> None:
        fields = parsed("response", texts=["hello"], tool_calls=[BUY])
        assert list(fields) == ["response"]
        assert shown(fields["response"]) == [
            ("text", "texts[0]", "response", "hello"),
            ("tool_call", "tool_calls[0]", "response", "buy\nwhat\na car"),
        ]

    def test_messages_are_what_is_answered_and_an_echo_is_an_answer_still(self) -> None:
        fields = parsed("response", structured_messages=[user("say it")], texts=["it"])
        assert shown(fields["prompt"]) == [
            ("message", "structured_messages[0].content", "prompt", "say it")
        ]
        (answer,) = fields["response"]
        assert (answer.judged.text, answer.judged.context) == ("it", (Turn("user", "say it"),))

    def test_nothing_said_is_nothing_to_judge(self) -> None:
        assert parsed("response") == {"response": []}


class TestRefusals:
    @pytest.mark.parametrize(
        ("body", "param"),
        [
            ({"input_type": "both"}, "input_type"),
            ({"input_type": None}, "input_type"),
            ({"input_type": []}, "input_type"),
            ({"texts": "hello"}, "texts"),
            ({"texts": [1]}, "texts[0]"),
            ({"texts": ["a", None]}, "texts[1]"),
            ({"structured_messages": {"role": "user"}}, "structured_messages"),
            ({"structured_messages": ["hello"]}, "structured_messages[0]"),
            ({"structured_messages": [{"content": "x"}]}, "structured_messages[0].role"),
            ({"structured_messages": [user(3)]}, "structured_messages[0].content"),
            ({"tool_calls": {"function": {}}}, "tool_calls"),
        ],
    )
    def test_what_is_wrong_is_named(self, body: dict[str, Any], param: str) -> None:
        with pytest.raises(BadRequest) as refused:
            litellm_guardrail.parse({**AROUND, "input_type": "request", **body})
        assert (refused.value.status, refused.value.param) == (400, param)
        assert refused.value.message.startswith(param)

    @pytest.mark.parametrize(
        ("body", "place"),
        [
            ({"images": ["aGVsbG8="]}, "images[0]"),
            (
                {"structured_messages": [user([{"type": "image_url", "image_url": "x"}])]},
                "structured_messages[0].content[0]",
            ),
            ({"structured_messages": [user("x") | {"audio": {"id": "1"}}]}, None),
        ],
    )
    def test_what_no_guard_reads_is_refused_unless_told(
        self, body: dict[str, Any], place: str | None
    ) -> None:
        with pytest.raises(Unscannable) as refused:
            parsed(texts=["hello"], **body)
        assert place is None or refused.value.param == place
        whole = {**AROUND, "input_type": "request", "texts": ["hello"], **body}
        fields = litellm_guardrail.parse(whole, allow_unscannable=True)
        assert "hello" in [field.judged.text for field in fields["prompt"]]


leaf = st.text(st.characters(exclude_categories=("C", "Z")), min_size=1, max_size=8).map(
    # No word, so that nothing may pass over it.
    lambda text: f"~ {text}"
)
value = st.recursive(
    leaf,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text("abc", max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)
part = st.builds(lambda text: {"type": "text", "text": text}, leaf)
call = st.builds(
    lambda name, arguments, extra: {
        "id": "1",
        "type": "function",
        "function": {"name": name, "arguments": arguments},
        "x": extra,
    },
    leaf,
    leaf,
    value,
)
message = st.builds(
    lambda role, content, extra, calls: {
        "role": role,
        "content": content,
        "extra": extra,
        "tool_calls": calls,
    },
    st.sampled_from(["system", "developer", "user", "assistant", "tool", "function"]),
    leaf | st.lists(part, min_size=1, max_size=3) | st.none(),
    value,
    st.lists(call, max_size=2),
)
bodies = st.fixed_dictionaries(
    {"input_type": st.sampled_from(["request", "response"])},
    optional={
        "texts": st.none() | st.lists(leaf, max_size=3),
        "structured_messages": st.none() | st.lists(message, max_size=3),
        "tools": st.none() | st.lists(st.dictionaries(st.text("abc"), value, max_size=3)),
        "tool_calls": st.none() | st.lists(call, max_size=2),
        "new": value,
    },
)


@given(bodies)
def test_no_string_of_a_request_escapes(body: dict[str, Any]) -> None:
    fields = litellm_guardrail.parse(body)
    texts = "\n".join(one.judged.text for group in fields.values() for one in group)
    for planted in strings(body):
        if planted.startswith("~ "):
            assert planted in texts


@given(st.dictionaries(st.sampled_from([*AROUND, "input_type"]), value | st.just("request")))
def test_any_other_object_is_read_or_refused_with_its_place(body: dict[str, Any]) -> None:
    refused: SluicegateError | None = None
    try:
        litellm_guardrail.parse(body)
    except SluicegateError as error:
        refused = error
    assert refused is None or (refused.status == 400 and "~" not in refused.message)


POLICY = Policy(
    id="p",
    rules=(
        Rule(direction="response", severity=Severity.MINOR, action=Action.REGENERATE),
        Rule(direction="prompt", severity=Severity.MODERATE, action=Action.BLOCK),
        Rule(direction="prompt", severity=Severity.MINOR, action=Action.ANNOTATE),
        Rule(action=Action.ALLOW),
    ),
)


@pytest.fixture
async def guarded(make_rig: MakeRig) -> AsyncIterator[Rig]:
    async with make_rig(POLICY) as rig:
        yield rig


async def answered(judge: FieldJudge, fields: Mapping[Direction, list[Field]]) -> dict[str, Any]:
    judged = {}
    for direction, asked in fields.items():
        judgements = await judge.judge(POLICY, direction, asked)
        judged[direction] = (prevailing(POLICY, direction, judgements), judgements)
    return litellm_guardrail.render(judged)


class TestAnswers:
    @pytest.mark.parametrize(
        ("kind", "text", "reason"),
        [
            ("request", "hello", None),
            ("request", "minor-drugs", None),
            (
                "request",
                f"{CANARY} severe-economic_crime",
                "The request was blocked: judged to be of severe severity (economic crime)",
            ),
            (
                "response",
                f"{CANARY} minor-drugs",
                "The answer was blocked: judged to be of minor severity (drugs)",
            ),
            ("response", "hello", None),
        ],
    )
    async def test_what_the_policy_would_not_let_pass_is_blocked(
        self, guarded: Rig, kind: str, text: str, reason: str | None
    ) -> None:
        answer = await answered(guarded.runtime.judge, parsed(kind, texts=["w1", text]))
        assert answer == {"action": "BLOCKED" if reason else "NONE", "blocked_reason": reason}

    async def test_an_old_turn_does_not_block_a_conversation_for_ever(self, guarded: Rig) -> None:
        old = "severe-violence"
        messages = [user(old), assistant("no"), user("hello")]
        body: dict[str, Any] = {"structured_messages": messages, "texts": [old, "no", "hello"]}
        assert (await answered(guarded.runtime.judge, parsed(**body)))["action"] == "NONE"
        messages[-1] = user(old)
        assert (await answered(guarded.runtime.judge, parsed(**body)))["action"] == "BLOCKED"

    async def test_a_definition_is_read_milder_than_words(self, guarded: Rig) -> None:
        tool = {"type": "function", "function": {"description": "moderate-violence"}}
        answer = await answered(guarded.runtime.judge, parsed(tools=[tool]))
        assert answer["action"] == "NONE"

    async def test_nothing_is_no_harm(self, guarded: Rig) -> None:
        for kind in ("request", "response"):
            answer = await answered(guarded.runtime.judge, parsed(kind))
            assert answer == {"action": "NONE", "blocked_reason": None}

    async def test_every_action_of_a_policy_is_one_of_litellms(self, guarded: Rig) -> None:
        judge = guarded.runtime.judge
        texts = ["hello", "minor-drugs", "severe-drugs"]
        found = set()
        for kind in ("request", "response"):
            for text in texts:
                fields = parsed(kind, texts=[text])
                for direction, asked in fields.items():
                    judgements = await judge.judge(POLICY, direction, asked)
                    decision = prevailing(POLICY, direction, judgements)
                    answer = litellm_guardrail.render({direction: (decision, [])})
                    is_blocked = decision.action in (Action.REGENERATE, Action.BLOCK)
                    assert (answer["action"] == "BLOCKED") == is_blocked
                    found.add(decision.action)
        assert found == set(Action)
