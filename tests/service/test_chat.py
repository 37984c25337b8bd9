"""The chat dialect: what is scanned of a request and an answer, and how answers are rendered."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service import sse
from service.body import strings
from service.chat import ChatDialect
from service.errors import BadRequest, UpstreamMalformed
from service.exchange import Exchange, Refusal, Retry

CHAT = ChatDialect()
VLLM = Path(__file__).parents[1] / "fixtures" / "vllm"
REFUSAL = Refusal("No.", "stop")


def parsed(*messages: dict[str, Any], **more: Any) -> Exchange:
    return CHAT.parse({"model": "m", "messages": list(messages), **more})


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(content: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def text_part(text: str, **more: Any) -> dict[str, Any]:
    return {"type": "text", "text": text, **more}


def scanned(exchange: Exchange) -> list[tuple[str, str, str]]:
    return [(field.name, field.judged.role, field.judged.text) for field in exchange.fields]


def data_of(stream: bytes) -> list[str]:
    parser = sse.EventParser()
    return [event.data for event in (*parser.feed(stream), *parser.finish()) if event.data]


class TestRequests:
    def test_each_message_is_judged_in_the_context_of_those_before(self) -> None:
        exchange = parsed({"role": "system", "content": "Be kind."}, user("a"), assistant("b"))
        assert scanned(exchange) == [
            ("system", "prompt", "Be kind."),
            ("message", "prompt", "a"),
            ("prefill", "response", "b"),
        ]
        assert [turn.text for turn in exchange.fields[2].judged.context] == ["Be kind.", "a"]

    def test_turns_that_were_answered_are_past_and_the_system_message_never_is(self) -> None:
        exchange = parsed({"role": "system", "content": "s"}, user("a"), assistant("b"), user("c"))
        past = [field.is_past for field in exchange.fields if not field.is_joint]
        assert past == [False, True, True, False]

    def test_the_newest_words_of_a_user_are_judged_together_too(self) -> None:
        turns = [user("how do I"), assistant("yes?"), user("steal a car")]
        *_, joint = parsed(*turns).fields
        assert (joint.path, joint.judged.text) == ("messages", "how do I\nsteal a car")
        assert joint.is_joint
        assert not any(field.is_joint for field in parsed(*turns[:2]).fields)
        assert not any(field.is_joint for field in parsed(user("a"), assistant("b")).fields)

    def test_a_prefill_is_not_past(self) -> None:
        exchange = parsed(user("a"), assistant("Sure, first"))
        assert [field.is_past for field in exchange.fields] == [False, False]

    @pytest.mark.parametrize(
        ("message", "field", "text"),
        [
            (user("hi"), "message", "hi"),
            ({"role": "developer", "content": "d"}, "system", "d"),
            ({"role": "tool", "content": "r", "tool_call_id": "1"}, "tool_result", "r"),
            (
                {"role": "user", "content": [{"type": "text", "text": "x"}]},
                "message",
                "x",
            ),
            (
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [
                        {
                            "id": "1",
                            "type": "function",
                            "function": {"name": "send", "arguments": '{"to":"caf\\u00e9"}'},
                        }
                    ],
                },
                "tool_call",
                "send\nto\ncafé",
            ),
            ({"role": "assistant", "content": "", "reasoning": "hm"}, "reasoning", "hm"),
            ({"role": "assistant", "refusal": "no"}, "refusal", "no"),
            ({"role": "user", "content": "", "name": "Mallory"}, "other", "Mallory"),
            ({"role": "user", "content": "", "new_key": {"deep": ["t"]}}, "other", "deep\nt"),
        ],
    )
    def test_every_part_of_a_message_is_scanned(
        self, message: dict[str, Any], field: str, text: str
    ) -> None:
        found = [(name, piece) for name, _, piece in scanned(parsed(user("q"), message))]
        assert (field, text) in found

    def test_tools_documents_and_unknown_keys_are_scanned(self) -> None:
        exchange = parsed(
            user("q"),
            tools=[{"type": "function", "function": {"name": "f", "description": "does f"}}],
            documents=[{"title": "t", "text": "body"}],
            guided_regex="[a-z]+",
        )
        found = {name: text for name, _, text in scanned(exchange)}
        assert "does f" in found["tool_definition"]
        assert found["document"] == "title\nt\ntext\nbody"
        assert "[a-z]+" in found["other"]

    @given(
        st.recursive(
            st.text(st.characters(exclude_categories=("C", "Z")), min_size=1),
            lambda inner: st.lists(inner) | st.dictionaries(st.text("abc", min_size=1), inner),
            max_leaves=8,
        )
    )
    def test_no_string_of_an_unknown_field_escapes(self, value: Any) -> None:
        exchange = parsed({"role": "user", "content": "q", "extra": value}, extra=value)
        texts = "\n".join(text for _, _, text in scanned(exchange))
        assert all(string in texts for string in strings(value))

    @pytest.mark.parametrize(
        ("body", "param"),
        [
            ({"messages": [user("a")]}, "model"),
            ({"model": 3, "messages": [user("a")]}, "model"),
            ({"model": "m"}, "messages"),
            ({"model": "m", "messages": []}, "messages"),
            ({"model": "m", "messages": "a"}, "messages"),
            ({"model": "m", "messages": ["a"]}, "messages[0]"),
            ({"model": "m", "messages": [{"role": "wizard", "content": "a"}]}, "messages[0].role"),
            ({"model": "m", "messages": [{"role": [], "content": "a"}]}, "messages[0].role"),
            ({"model": "m", "messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
            ({"model": "m", "messages": [user("a")], "stream": "yes"}, "stream"),
            ({"model": "m", "messages": [user("a")], "n": 0}, "n"),
            ({"model": "m", "messages": [user("a")], "n": True}, "n"),
        ],
    )
    def test_a_malformed_request_names_the_key(self, body: dict[str, Any], param: str) -> None:
        with pytest.raises(BadRequest) as caught:
            CHAT.parse(body)
        assert caught.value.param == param

    @pytest.mark.parametrize("kind", ["image_url", "input_audio", "file", "video_url", "new"])
    def test_a_part_that_nobody_judges_is_named(self, kind: str) -> None:
        parts = [{"type": "text", "text": "look"}, {"type": kind, kind: {"url": "x"}}]
        exchange = parsed({"role": "user", "content": parts})
        assert exchange.unscannable == ("messages[0].content[1]",)
        assert scanned(exchange) == [("message", "prompt", "look")]

    @pytest.mark.parametrize(
        ("extra", "path"),
        [
            ({"chat_template": "{{x}}"}, "chat_template"),
            ({"prompt_embeds": "AAAA"}, "prompt_embeds"),
            ({"prompt_token_ids": [1, 2]}, "prompt_token_ids"),
            ({"new": {"tokens": [[1, 2]]}, "new_tokens": [[1, 2]]}, "new_tokens"),
        ],
    )
    def test_what_hides_words_from_a_guard_is_named(self, extra: Any, path: str) -> None:
        assert parsed(user("a"), **extra).unscannable == (path,)

    @pytest.mark.parametrize(
        ("value", "blocks"),
        [
            ({}, (False, False)),
            ({"model": "omni-moderation-latest"}, (False, False)),
            ({"policy": {"input": {"mode": "block"}}}, (True, False)),
            ({"policy": {"input": {"mode": "score"}, "output": {"mode": "block"}}}, (False, True)),
            ({"policy": {"input": None, "output": {}}}, (False, False)),
        ],
    )
    def test_openais_moderation_key(self, value: Any, blocks: tuple[bool, bool]) -> None:
        asked = parsed(user("a"), moderation=value).moderation
        assert asked is not None
        assert (asked.blocks_prompt, asked.blocks_response) == blocks

    @pytest.mark.parametrize(
        "value", ["x", {"policy": "x"}, {"policy": {"input": {"mode": "loud"}}}]
    )
    def test_a_moderation_key_that_is_none_is_refused(self, value: Any) -> None:
        with pytest.raises(BadRequest, match="moderation"):
            parsed(user("a"), moderation=value)

    def test_our_own_key_is_the_only_one_taken_out(self) -> None:
        assert CHAT.forwarded(parsed(user("a"), top_k=3)) is None
        exchange = parsed(user("a"), top_k=3, moderation={"model": "x"})
        assert CHAT.forwarded(exchange) == {"model": "m", "messages": [user("a")], "top_k": 3}


class TestAnswers:
    EXCHANGE = parsed(user("q"))

    def test_an_answer_of_vllm(self) -> None:
        body = json.loads((VLLM / "chat.json").read_bytes())
        answer = CHAT.parse_answer(self.EXCHANGE, body)
        (choice,) = answer.choices
        assert [(f.name, f.judged.text) for f in choice.fields] == [
            ("text", "The capital of France is Paris.")
        ]
        assert choice.fields[0].judged.role == "response"
        assert choice.fields[0].judged.context[-1].text == "q"
        assert (answer.prompt_tokens, answer.completion_tokens) == (37, 8)

    @pytest.mark.parametrize("name", ["stream", "stream_usage", "stream_n2", "stream_logprobs"])
    def test_a_stream_of_vllm_adds_up_to_an_answer(self, name: str) -> None:
        exchange = CHAT.parse(json.loads((VLLM / f"{name}.request.json").read_bytes()))
        answer = CHAT.parse_stream(exchange, data_of((VLLM / f"{name}.sse").read_bytes()))
        assert len(answer.choices) == exchange.choices
        for choice in answer.choices:
            assert choice.body["finish_reason"] in ("stop", "length")
            assert choice.body["message"]["content"] == choice.fields[0].judged.text
        assert bool(answer.completion_tokens) == (name == "stream_usage")

    def test_an_answer_of_parts_is_judged_in_one_run_as_a_client_shows_it(self) -> None:
        parts = [text_part("bo"), text_part("mb ", note="a way")]
        body = {"choices": [{"index": 0, "message": assistant(parts), "finish_reason": "stop"}]}
        (choice,) = CHAT.parse_answer(self.EXCHANGE, body).choices
        assert [field.judged.text for field in choice.fields] == ["bomb \na way"]

    def test_parts_over_deltas_are_judged_in_one_run_too(self) -> None:
        events = [
            json.dumps({"choices": [{"index": 0, "delta": {"content": [text_part(text)]}}]})
            for text in ("bo", "mb")
        ]
        (choice,) = CHAT.parse_stream(self.EXCHANGE, [*events, "[DONE]"]).choices
        assert [field.judged.text for field in choice.fields] == ["bomb"]

    def test_tool_calls_split_over_deltas_are_joined_before_they_are_judged(self) -> None:
        deltas = [
            {"tool_calls": [{"index": 0, "id": "1", "function": {"name": "f", "arguments": ""}}]},
            {"tool_calls": [{"index": 0, "function": {"arguments": '{"a":"po'}}]},
            {"tool_calls": [{"index": 0, "function": {"arguments": 'ison"}'}}]},
        ]
        events = [
            json.dumps({"id": "x", "choices": [{"index": 0, "delta": delta}]}) for delta in deltas
        ]
        answer = CHAT.parse_stream(self.EXCHANGE, [*events, "[DONE]"])
        assert answer.choices[0].fields[0].judged.text == "f\na\npoison"

    @pytest.mark.parametrize(
        "body",
        [
            {},
            {"choices": None},
            {"choices": ["x"]},
            {"choices": [{"index": 0}]},
            {"choices": [{"index": "0", "message": {}}]},
            {"choices": [{"index": 0, "message": {"content": 3}}]},
            {"choices": [{"index": 0, "message": {}}, {"index": 0, "message": {}}]},
        ],
    )
    def test_an_answer_that_cannot_be_read_cannot_be_judged(self, body: dict[str, Any]) -> None:
        with pytest.raises((UpstreamMalformed, BadRequest)):
            CHAT.parse_answer(self.EXCHANGE, body)

    @pytest.mark.parametrize(
        "events",
        [
            [],
            ["[DONE]"],
            ["{"],
            ["[]"],
            ['{"error":{"message":"x"}}'],
            ['{"choices":[{"delta":{}}]}'],
            ['{"choices":[{"index":0,"delta":"x"}]}'],
            ['{"choices":[{"index":0,"delta":{"tool_calls":[{"index":7}]}}]}'],
        ],
    )
    def test_a_stream_that_cannot_be_read_cannot_be_judged(self, events: list[str]) -> None:
        with pytest.raises((UpstreamMalformed, BadRequest)):
            CHAT.parse_stream(self.EXCHANGE, events)


class TestRendering:
    def test_a_refusal_reads_as_a_message(self) -> None:
        answer = CHAT.refused(parsed(user("q"), n=2), "id1", 7, REFUSAL)
        assert [choice.body["message"]["content"] for choice in answer.choices] == ["No.", "No."]
        assert [choice.body["finish_reason"] for choice in answer.choices] == ["stop", "stop"]
        assert answer.body["id"] == "chatcmpl-id1"

    def test_under_a_response_format_the_refusal_stands_where_parsers_look(self) -> None:
        exchange = parsed(user("q"), response_format={"type": "json_object"})
        message = CHAT.refused_choice(exchange, 0, REFUSAL).body["message"]
        assert (message["content"], message["refusal"]) == (None, "No.")

    @pytest.mark.parametrize(
        ("messages", "expected"),
        [
            ([user("q")], [{"role": "system", "content": "I"}, user("q")]),
            (
                [{"role": "system", "content": "S"}, user("q")],
                [{"role": "system", "content": "S\n\nI"}, user("q")],
            ),
            (
                [{"role": "system", "content": [{"type": "text", "text": "S"}]}, user("q")],
                [
                    {
                        "role": "system",
                        "content": [{"type": "text", "text": "S"}, {"type": "text", "text": "I"}],
                    },
                    user("q"),
                ],
            ),
        ],
    )
    def test_a_retry_instructs_in_one_system_message(
        self, messages: list[dict[str, Any]], expected: list[dict[str, Any]]
    ) -> None:
        exchange = parsed(*messages, temperature=1, n=3)
        body = CHAT.retried(exchange, Retry(seed=5, instruction="I", choices=(2,)))
        assert body["messages"] == expected
        assert (body["seed"], body["n"], body["temperature"]) == (5, 1, 1)
        assert exchange.body["messages"] == messages

    def test_a_content_of_parts_is_rendered_as_a_stream_too(self) -> None:
        exchange = parsed(user("q"), stream=True)
        message = {"role": "assistant", "content": [{"type": "text", "text": "a"}]}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        stream = CHAT.streamed(exchange, {"id": "x", "model": "m", "choices": [choice]})
        (parsed_choice,) = CHAT.parse_stream(exchange, data_of(stream)).choices
        assert parsed_choice.body["message"] == message

    @given(
        st.lists(
            st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1),
            min_size=1,
            max_size=3,
        )
    )
    def test_a_rendered_stream_adds_up_to_the_answer(self, texts: list[str]) -> None:
        exchange = parsed(user("q"), stream=True, stream_options={"include_usage": True})
        body = {
            "id": "x",
            "created": 1,
            "model": "m",
            "choices": [
                {"index": i, "message": assistant(text), "finish_reason": "stop"}
                for i, text in enumerate(texts)
            ],
            "usage": {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3},
        }
        stream = CHAT.streamed(exchange, body)
        assert stream.count(b"data: [DONE]\n\n") == 1
        answer = CHAT.parse_stream(exchange, data_of(stream))
        assert [choice.body["message"] for choice in answer.choices] == [
            assistant(text) for text in texts
        ]
        assert answer.completion_tokens == 2
