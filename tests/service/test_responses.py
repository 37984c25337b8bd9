"""The Responses dialect: what is scanned of a request and an answer, and what is rendered."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import httpx
import openai
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.errors import BadRequest, UpstreamMalformed
from service.exchange import Annotations, Answer, Choice, Exchange, Field, Refusal, Retry
from service.responses import ResponsesDialect
from tests.fake_upstream import Answer as FakeAnswer
from tests.service.rig import BAD, GRAVE, SAFE, Rig
from tests.service.rig import REFUSAL as REFUSAL_TEXT

DIALECT = ResponsesDialect()
REFUSAL = Refusal("No.", "stop")
INSTRUCTION = (
    "A previous answer to this conversation was withheld, because it was judged to be of"
    " severe severity (violence, white collar crime). Answer again without anything of that kind:"
    " give what help is safe, and where none is, say briefly that you cannot help with it."
)


def parsed(given: Any = "q", **more: Any) -> Exchange:
    return DIALECT.parse({"model": "m", "input": given, **more})


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def said(text: str, identity: str = "msg_1") -> dict[str, Any]:
    part = {"type": "output_text", "text": text, "annotations": []}
    return {
        "id": identity,
        "type": "message",
        "role": "assistant",
        "status": "completed",
        "content": [part],
    }


def call(arguments: str) -> dict[str, Any]:
    return {"type": "function_call", "name": "send", "call_id": "c1", "arguments": arguments}


def response(*output: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "id": "resp_1",
        "object": "response",
        "created_at": 7,
        "status": "completed",
        "model": "m",
        "output": list(output),
        "parallel_tool_calls": True,
        "tool_choice": "auto",
        "tools": [],
        "usage": {
            "input_tokens": 3,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": 2,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": 5,
        },
        **more,
    }


def scanned(fields: tuple[Field, ...]) -> list[tuple[str, str, str]]:
    return [(field.name, field.judged.role, field.judged.text) for field in fields]


def answered(exchange: Exchange, *output: dict[str, Any], **more: Any) -> Choice:
    (choice,) = DIALECT.parse_answer(exchange, response(*output, **more)).choices
    return choice


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Path and text of all strings that stand in ``value``, keys of objects included."""
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from leaves(item, f"{path}[{number}]")
    elif isinstance(value, dict):
        for key, item in value.items():
            yield path, key
            yield from leaves(item, f"{path}.{key}" if path else key)


def escaped(
    body: Mapping[str, Any], fields: tuple[Field, ...], unscannable: tuple[str, ...]
) -> set[str]:
    """Sentences in ``body`` that nobody judges and nobody refuses."""
    texts = "\n".join(field.judged.text for field in fields)
    return {
        text
        for path, text in leaves(body)
        if " " in text and text not in texts and not path.startswith(unscannable)
    }


SENTENCES = st.text('abcé{}"\\', min_size=1, max_size=6).map(lambda text: f"say {text}")
WORDS = st.sampled_from(["id", "type", "status", "phase", "name", "x_new", "annotations", "user"])
ANY = st.recursive(
    SENTENCES | st.integers() | st.none() | st.booleans(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(WORDS | SENTENCES, inner, max_size=3)
    ),
    max_leaves=6,
)


def extended(known: dict[str, Any], *free: str) -> st.SearchStrategy[dict[str, Any]]:
    """Objects with the keys that are known, ``free`` ones of any value, and others."""
    names = st.sampled_from([*free, "x_new", "another key"])
    return st.builds(
        lambda more, some: more | some, st.dictionaries(names, ANY), st.fixed_dictionaries(known)
    )


PARTS = st.one_of(
    extended(
        {"type": st.sampled_from(["input_text", "output_text", "text"]), "text": SENTENCES},
        "annotations",
    ),
    extended({"type": st.just("refusal"), "refusal": SENTENCES}, "text"),
    extended(
        {"type": st.sampled_from(["input_image", "input_file", "new"])}, "image_url", "file_data"
    ),
)
CONTENT = SENTENCES | st.lists(PARTS, max_size=3)
ITEM_KEYS = ("id", "status", "call_id", "namespace", "phase", "encrypted_content")
MESSAGES = extended(
    {"role": st.sampled_from(["user", "assistant", "system", "developer"]), "content": CONTENT},
    *ITEM_KEYS,
)
OTHER_ITEMS = st.one_of(
    extended(
        {
            "type": st.sampled_from(["function_call", "custom_tool_call"]),
            "name": SENTENCES,
            "arguments": SENTENCES,
            "input": SENTENCES,
        },
        *ITEM_KEYS,
    ),
    extended({"type": st.just("function_call_output"), "output": CONTENT}, *ITEM_KEYS),
    extended(
        {
            "type": st.just("reasoning"),
            "summary": st.lists(
                st.fixed_dictionaries({"type": st.just("summary_text"), "text": SENTENCES})
            ),
        },
        *ITEM_KEYS,
    ),
    extended(
        {"type": st.sampled_from(["mcp_call", "shell_call", "item_reference", "a new type"])},
        *ITEM_KEYS, "arguments", "output", "action",
    ),
)  # fmt: skip


class TestRequests:
    def test_instructions_and_items_are_judged_in_the_context_of_those_before(self) -> None:
        exchange = parsed([user("a"), said("b"), user("c")], instructions="Be kind.")
        assert scanned(exchange.fields)[:4] == [
            ("system", "prompt", "Be kind."),
            ("message", "prompt", "a"),
            ("text", "response", "b"),
            ("message", "prompt", "c"),
        ]
        assert [turn.text for turn in exchange.fields[3].judged.context] == ["Be kind.", "a", "b"]
        assert [field.is_past for field in exchange.fields[:4]] == [False, True, True, False]

    def test_a_string_is_a_user_message(self) -> None:
        assert scanned(parsed("q").fields) == [("message", "prompt", "q")]

    @pytest.mark.parametrize(
        ("item", "field", "role", "text"),
        [
            (user("x"), "message", "prompt", "x"),
            ({"type": "message", **user("x")}, "message", "prompt", "x"),
            ({"role": "developer", "content": "x"}, "system", "prompt", "x"),
            (
                {"role": "user", "content": [{"type": "input_text", "text": "x"}]},
                "message",
                "prompt",
                "x",
            ),
            (
                {"role": "assistant", "content": [{"type": "refusal", "refusal": "x"}]},
                "refusal",
                "response",
                "x",
            ),
            (call('{"to":"caf\\u00e9"}'), "tool_call", "response", "send\nto\ncafé"),
            (
                {"type": "custom_tool_call", "name": "run", "input": "x"},
                "tool_call",
                "response",
                "run\nx",
            ),
            ({"type": "function_call_output", "output": "x"}, "tool_result", "prompt", "x"),
            (
                {"type": "function_call_output", "output": [{"type": "input_text", "text": "x"}]},
                "tool_result",
                "prompt",
                "x",
            ),
            (
                {
                    "type": "reasoning",
                    "summary": [{"type": "summary_text", "text": "x"}],
                },
                "reasoning",
                "response",
                "x",
            ),
            (
                {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "x"}]},
                "reasoning",
                "response",
                "x",
            ),
            ({"type": "mcp_call", "arguments": '"caf\\u00e9"'}, "other", "prompt", "café"),
            (
                {"type": "shell_call", "action": {"commands": ["rm"]}},
                "other",
                "prompt",
                "commands\nrm",
            ),
        ],
    )
    def test_every_item_is_scanned(
        self, item: dict[str, Any], field: str, role: str, text: str
    ) -> None:
        assert (field, role, text) in scanned(parsed([item]).fields)

    @pytest.mark.parametrize(
        ("body", "path"),
        [
            ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0]"),
            ({"input": [{"id": "msg_1"}]}, "input[0]"),
            (
                {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
                "input[0].content[0]",
            ),
            (
                {"input": [{"type": "function_call_output", "output": [{"type": "input_file"}]}]},
                "input[0].output[0]",
            ),
            (
                {"input": [{"type": "reasoning", "summary": [], "encrypted_content": "x"}]},
                "input[0].encrypted_content",
            ),
            ({"input": [{"type": "image_generation_call", "result": "iVBO"}]}, "input[0]"),
            (
                {"input": [{"type": "code_interpreter_call", "outputs": [{"type": "image"}]}]},
                "input[0]",
            ),
            ({"input": "q", "prompt": {"id": "pmpt_1"}}, "prompt"),
            ({"prompt": {"id": "pmpt_1"}}, "prompt"),
            ({"input": "q", "conversation": "conv_1"}, "conversation"),
        ],
    )
    def test_what_nobody_can_read_is_named(self, body: dict[str, Any], path: str) -> None:
        assert DIALECT.parse({"model": "m", **body}).unscannable == (path,)

    def test_the_items_of_one_answer_are_one_turn(self) -> None:
        """Else reasoning before a prefill would make the question one that was answered."""
        reasoning = {"type": "reasoning", "summary": [{"type": "summary_text", "text": "hm"}]}
        exchange = parsed([user("a"), reasoning, {"role": "assistant", "content": "Sure, first"}])
        assert [(field.name, field.is_past) for field in exchange.fields] == [
            ("message", False),
            ("reasoning", False),
            ("prefill", False),
        ]

    def test_tools_formats_and_unknown_keys_are_scanned(self) -> None:
        exchange = parsed(
            tools=[{"type": "function", "name": "f", "description": "does f"}],
            text={"format": {"type": "json_schema", "schema": {"description": "a shape"}}},
            structured_outputs={"regex": "[a-z]+ x"},
            previous_input_messages=[{"content": "from before"}],
        )
        found = {name: text for name, _, text in scanned(exchange.fields)}
        assert "does f" in found["tool_definition"]
        for text in ("a shape", "[a-z]+ x", "from before"):
            assert text in found["other"]

    @given(
        st.lists(MESSAGES | OTHER_ITEMS, min_size=1, max_size=4),
        st.dictionaries(
            st.sampled_from(
                ["tools", "text", "metadata", "user", "tool_choice", "reasoning", "include", "stop",
                 "prompt", "previous_input_messages", "safety_identifier", "x_new", "a new key"]
            ),
            ANY,
        ),
    )  # fmt: skip
    def test_no_sentence_of_a_request_escapes(
        self, items: list[dict[str, Any]], more: dict[str, Any]
    ) -> None:
        body = {"model": "m", "input": items, **more}
        try:
            exchange = DIALECT.parse(body)
        except BadRequest:
            return
        assert not escaped(body, exchange.fields, exchange.unscannable)

    @pytest.mark.parametrize(
        ("body", "param"),
        [
            ({"input": "q"}, "model"),
            ({"model": "m"}, "input"),
            ({"model": "m", "input": []}, "input"),
            ({"model": "m", "input": 3}, "input"),
            ({"model": "m", "input": [3]}, "input[0]"),
            ({"model": "m", "input": [{"type": 3}]}, "input[0].type"),
            ({"model": "m", "input": [{"role": "wizard", "content": "a"}]}, "input[0].role"),
            ({"model": "m", "input": [{"role": [], "content": "a"}]}, "input[0].role"),
            ({"model": "m", "input": [{"role": "user", "content": 3}]}, "input[0].content"),
            ({"model": "m", "input": [{"role": "user", "content": [3]}]}, "input[0].content[0]"),
            (
                {"model": "m", "input": [{"role": "user", "content": [{"type": "input_text"}]}]},
                "input[0].content[0].text",
            ),
            ({"model": "m", "input": "q", "instructions": ["x"]}, "instructions"),
            ({"model": "m", "input": "q", "stream": "yes"}, "stream"),
            ({"model": "m", "input": "q", "background": True}, "background"),
            ({"model": "m", "input": "q", "background": "true"}, "background"),
            ({"model": "m", "input": "q", "previous_response_id": "r"}, "previous_response_id"),
        ],
    )
    def test_a_malformed_request_names_the_key(self, body: dict[str, Any], param: str) -> None:
        with pytest.raises(BadRequest) as caught:
            DIALECT.parse(body)
        assert caught.value.param == param

    def test_background_has_a_code_of_its_own(self) -> None:
        with pytest.raises(BadRequest, match="leave background out") as caught:
            parsed(background=True)
        assert caught.value.code == "background_unsupported"

    @pytest.mark.parametrize(
        ("given", "sent"),
        [
            ({}, {"store": False}),
            ({"store": True}, {"store": False}),
            ({"store": False}, None),
            ({"store": 0}, {"store": False}),
            ({"store": False, "moderation": {"model": "x"}}, {"store": False}),
        ],
    )
    def test_the_upstream_stores_nothing(
        self, given: dict[str, Any], sent: dict[str, Any] | None
    ) -> None:
        forwarded = DIALECT.forwarded(parsed(top_k=3, **given))
        assert forwarded == (sent and {"model": "m", "input": "q", "top_k": 3, **sent})
        assert forwarded is None or forwarded["store"] is False

    @pytest.mark.parametrize(
        ("given", "sent"),
        [
            ({}, {"instructions": "I"}),
            ({"instructions": "S"}, {"instructions": "S\n\nI"}),
            ({"seed": 3}, {"instructions": "I", "seed": 5}),
        ],
    )
    def test_a_retry_instructs(self, given: dict[str, Any], sent: dict[str, Any]) -> None:
        body = DIALECT.retried(parsed(**given), Retry(5, "I", (0,)))
        assert body == {"model": "m", "input": "q", "store": False, **sent}


class TestAnswers:
    def test_a_message_is_judged_as_the_answer_to_the_request(self) -> None:
        answer = DIALECT.parse_answer(parsed("q", instructions="S"), response(said("a")))
        (choice,) = answer.choices
        assert scanned(choice.fields) == [("text", "response", "a")]
        assert [turn.text for turn in choice.fields[0].judged.context] == ["S", "q"]
        assert choice.body["output"] == [said("a")]
        assert (answer.prompt_tokens, answer.completion_tokens) == (3, 2)
        assert answer.body == response(said("a"))

    def test_an_answer_that_comes_back_as_input_is_judged_as_it_was(self) -> None:
        """So that the verdict on it serves again."""
        output = [call('{"a": 1}'), said("a")]
        choice = answered(parsed("q"), *output)
        again = parsed([user("q"), *output, user("more")])
        assert [field.judged for field in choice.fields] == [
            field.judged for field in again.fields if field.judged.role == "response"
        ]

    @pytest.mark.parametrize(
        ("item", "field", "text"),
        [
            (call('{"a":"p\\u006fison"}'), "tool_call", "send\na\npoison"),
            ({"type": "message", "content": [{"type": "refusal", "refusal": "x"}]}, "refusal", "x"),
            ({"type": "reasoning", "content": [{"type": "reasoning_text", "text": "x"}]},
             "reasoning", "x"),
            ({"type": "web_search_call", "action": {"query": "x y"}}, "other", "query\nx y"),
            (
                {"type": "message", "content": [
                    {"type": "output_text", "text": "", "annotations": [{"title": "a page"}]}]},
                "other",
                "title\na page",
            ),
        ],
    )  # fmt: skip
    def test_every_output_item_is_scanned(
        self, item: dict[str, Any], field: str, text: str
    ) -> None:
        assert (field, "response", text) in scanned(answered(parsed(), item).fields)

    def test_what_is_repeated_of_the_request_is_not_judged_again(self) -> None:
        asked: dict[str, Any] = {
            "instructions": "be kind to all",
            "metadata": {"k": "some text"},
            "tools": [{"type": "function", "name": "f", "description": "does f"}],
            "text": {"format": {"type": "json_schema", "schema": {"description": "a shape"}}},
        }
        echoed = asked | {"tools": [{**asked["tools"][0], "strict": True}]}
        choice = answered(parsed(**asked), said("a"), **echoed, truncation="disabled")
        assert scanned(choice.fields) == [("text", "response", "a")]

    @pytest.mark.parametrize(
        "changed",
        [
            {"instructions": "be cruel to all"},
            {"metadata": {"k": "other text"}},
            {"tools": [{"description": "does harm to all"}]},
            {"error": {"message": "a secret"}},
            {"x_new": "new text"},
        ],
    )
    def test_what_differs_from_the_request_is_judged(self, changed: dict[str, Any]) -> None:
        exchange = parsed(instructions="be kind to all", metadata={"k": "some text"}, tools=[])
        choice = answered(exchange, said("a"), **changed)
        assert not escaped(changed, choice.fields, ())

    @pytest.mark.parametrize("instructions", [None, "Be kind."])
    def test_the_instruction_of_a_retry_is_not_judged(self, instructions: str | None) -> None:
        exchange = replace(parsed(instructions=instructions), instruction=INSTRUCTION)
        told = DIALECT.retried(exchange, Retry(1, INSTRUCTION, (0,)))["instructions"]
        assert scanned(answered(exchange, instructions=told).fields) == []
        more = f"{told} And more."
        assert ("other", "response", more) in scanned(answered(exchange, instructions=more).fields)

    @pytest.mark.parametrize(
        ("item", "path"),
        [
            ({"type": "reasoning", "encrypted_content": "x"}, "output[0].encrypted_content"),
            ({"type": "image_generation_call", "result": "iVBO"}, "output[0]"),
            ({"type": "message", "content": [{"type": "output_audio"}]}, "output[0].content[0]"),
        ],
    )
    def test_what_nobody_can_read_is_named(self, item: dict[str, Any], path: str) -> None:
        assert DIALECT.parse_answer(parsed(), response(item)).unscannable == (path,)

    @given(
        st.lists(OTHER_ITEMS | MESSAGES.map(lambda item: item | {"type": "message"}), max_size=3),
        st.dictionaries(
            st.sampled_from(["error", "instructions", "usage", "metadata", "text", "x_new"]), ANY
        ),
    )
    def test_no_sentence_of_an_answer_escapes(
        self, output: list[dict[str, Any]], more: dict[str, Any]
    ) -> None:
        body = response(*output, **more)
        try:
            answer = DIALECT.parse_answer(parsed(), body)
        except BadRequest:
            return
        assert not escaped(body, answer.choices[0].fields, answer.unscannable)

    @pytest.mark.parametrize(
        "body",
        [
            {},
            {"output": [], "status": "queued"},
            {"output": [], "status": None},
            {"output": "x", "status": "completed"},
            {"output": ["x"], "status": "completed"},
            {"output": [{"type": "message", "content": 3}], "status": "completed"},
        ],
    )
    def test_an_answer_that_cannot_be_read_cannot_be_judged(self, body: dict[str, Any]) -> None:
        with pytest.raises((UpstreamMalformed, BadRequest)):
            DIALECT.parse_answer(parsed(), body)


def client(body: Mapping[str, Any]) -> openai.OpenAI:
    """The real client, before an upstream that answers ``body``."""
    transport = httpx.MockTransport(lambda _: httpx.Response(200, json=body))
    # Newer versions of the client name another package's type, and take either.
    http_client: Any = httpx.Client(transport=transport)
    return openai.OpenAI(api_key="k", http_client=http_client, max_retries=0)


class Shape(pydantic.BaseModel):
    """What a client asks for with ``.parse()``."""

    answer: str


class TestRendering:
    def refused(self, finish_reason: Any = "stop", **more: Any) -> Mapping[str, Any]:
        refusal = Refusal("No.", finish_reason)
        answer = DIALECT.refused(parsed(**more), "id1", 7, refusal)
        return DIALECT.assembled(answer, answer.choices)

    def test_a_refusal_reads_as_a_response(self) -> None:
        tools = [{"type": "function", "name": "f", "parameters": {}}]
        body = self.refused(instructions="S", metadata={"k": "v"}, tools=tools, temperature=0.5)
        read = client(body).responses.create(model="m", input="q")
        assert (read.id, read.status, read.output_text) == ("resp_id1", "completed", "No.")
        assert read.output[0].id == "msg_id1"
        assert (read.instructions, read.metadata, read.temperature) == ("S", {"k": "v"}, 0.5)
        assert read.usage is not None
        assert read.usage.total_tokens == 0
        # The client is lenient, its types are not.
        assert type(read).model_validate(body).error is None

    def test_a_filtered_response_is_incomplete(self) -> None:
        read = client(self.refused("content_filter")).responses.create(model="m", input="q")
        assert read.incomplete_details is not None
        assert (read.status, read.incomplete_details.reason) == ("incomplete", "content_filter")

    def test_the_parser_of_structured_output_survives_a_refusal(self) -> None:
        shape = {"format": {"type": "json_schema", "name": "Shape", "schema": {}}}
        body = self.refused(text=shape)
        read = client(body).responses.parse(model="m", input="q", text_format=Shape)
        assert read.output_parsed is None
        assert body["output"][0]["content"] == [{"type": "refusal", "refusal": "No."}]

    def test_nothing_of_a_rejected_response_stands_around_another(self) -> None:
        exchange = parsed(instructions="S")
        rejected = response(
            said("bad"), instructions="S", output_messages=["bad"], x_new="bad", error={"m": "bad"}
        )
        answer = Answer((), rejected)
        better = answered(exchange, said("good"))
        for choice in (better, DIALECT.refused_choice(exchange, 0, REFUSAL)):
            shown = DIALECT.assembled(answer, (DIALECT.renumbered(choice, 0),))
            assert "bad" not in json.dumps(shown)
            assert (shown["id"], shown["instructions"], shown["error"]) == ("resp_1", "S", None)

    def test_verdicts_stand_where_clients_look(self) -> None:
        asked = Annotations("guard", None, {0: None}, frozenset(), openai=True, azure=True)
        shown = DIALECT.annotated(response(said("a")), asked)
        assert shown["moderation"]["input"]["type"] == "error"
        assert "error" in shown["content_filter_results"]
        assert shown["prompt_filter_results"][0]["prompt_index"] == 0


def upstream(*output: dict[str, Any], **more: Any) -> FakeAnswer:
    return FakeAnswer(body=json.dumps(response(*output, **more)).encode())


class TestBehindTheGateway:
    async def test_what_is_safe_passes_as_it_came(self, rig: Rig) -> None:
        rig.answers(upstream(said("hello")))
        reply = await rig.ask(DIALECT, {"input": SAFE})
        assert reply.body == json.dumps(response(said("hello"))).encode()
        (received,) = rig.fake.received
        assert (received.path, received.json["store"]) == ("/v1/responses", False)

    async def test_after_a_regeneration_nothing_of_the_rejected_answer_is_left(
        self, rig: Rig
    ) -> None:
        rig.answers(upstream(said(BAD)), upstream(call("{}"), id="resp_2"))
        reply = await rig.ask(DIALECT, {"input": SAFE, "instructions": "S"})
        assert BAD.encode() not in reply.body
        assert reply.said is not None
        assert reply.said["output"] == [call("{}")]
        second = rig.fake.received[1].json
        assert second["instructions"].startswith("S\n\nA previous answer")

    async def test_a_refused_answer_is_a_response_in_json_and_in_a_stream(self, rig: Rig) -> None:
        for is_stream in (False, True):
            rig.answers(*[upstream(call(json.dumps({"text": GRAVE})))] * 6)
            reply = await rig.ask(DIALECT, {"input": SAFE, "stream": is_stream})
            assert GRAVE.encode() not in reply.body
            assert REFUSAL_TEXT.encode() in reply.body
            assert (b"event: response.completed" in reply.body) == is_stream

    async def test_a_harmful_tool_result_never_reaches_the_upstream(self, rig: Rig) -> None:
        items = [user("q"), call("{}"), {"type": "function_call_output", "output": GRAVE}]
        reply = await rig.ask(DIALECT, {"input": items})
        assert rig.fake.received == []
        assert reply.said is not None
        assert reply.said["output"][0]["content"][0]["text"] == REFUSAL_TEXT
