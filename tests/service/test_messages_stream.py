"""Streams of the Messages dialect: events to a message, and the reverse."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service import messages_stream, sse
from service.body import dumps
from service.errors import UpstreamMalformed
from service.exchange import Annotations
from service.messages import MessagesDialect
from service.messages_stream import whole

MESSAGES = MessagesDialect()
HEAD = {"id": "msg_1", "type": "message", "role": "assistant", "model": "m"}
START = {
    "type": "message_start",
    "message": {**HEAD, "content": [], "usage": {"input_tokens": 3, "output_tokens": 0}},
}
END = {
    "type": "message_delta",
    "delta": {"stop_reason": "end_turn", "stop_sequence": None},
    "usage": {"input_tokens": 3, "output_tokens": 4},
}
STOP = {"type": "message_stop"}
EXCHANGE = MESSAGES.parse(
    {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "q"}]}
)


def block(index: int, start: Any, *deltas: Any) -> list[dict[str, Any]]:
    return [
        {"type": "content_block_start", "index": index, "content_block": start},
        *({"type": "content_block_delta", "index": index, "delta": delta} for delta in deltas),
        {"type": "content_block_stop", "index": index},
    ]


def data(*events: Any) -> list[str]:
    return [event if isinstance(event, str) else json.dumps(event) for event in events]


def streamed(*events: Any) -> dict[str, Any]:
    """The message in ``events``, between a start and an end."""
    return whole(data(START, *events, END, STOP))


def texts(message: dict[str, Any]) -> str:
    """All that is judged of a message."""
    answer = MESSAGES.parse_answer(EXCHANGE, message)
    return "\n".join(field.judged.text for field in answer.choices[0].fields)


EMPTY = {"type": "text", "text": ""}
TOOL = {"type": "tool_use", "id": "1", "name": "f", "input": {}}


def text_delta(text: str) -> dict[str, Any]:
    return {"type": "text_delta", "text": text}


def json_delta(piece: str) -> dict[str, Any]:
    return {"type": "input_json_delta", "partial_json": piece}


class TestWhole:
    def test_a_stream_adds_up_to_a_message(self) -> None:
        message = streamed(
            {"type": "ping"},
            *block(
                0,
                {"type": "thinking", "thinking": "", "signature": ""},
                {"type": "thinking_delta", "thinking": "h"},
                {"type": "thinking_delta", "thinking": "m"},
                {"type": "signature_delta", "signature": "f00"},
            ),
            *block(1, EMPTY, text_delta("Par"), text_delta("is.")),
            *block(2, TOOL, json_delta('{"to":"a'), json_delta('nn"}')),
        )
        assert message == {
            **HEAD,
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": "f00"},
                {"type": "text", "text": "Paris."},
                {**TOOL, "input": {"to": "ann"}},
            ],
            "stop_reason": "end_turn",
            "stop_sequence": None,
            "usage": {"input_tokens": 3, "output_tokens": 4},
        }

    def test_blocks_may_be_filled_by_turns(self) -> None:
        first, second = block(0, EMPTY, text_delta("a")), block(1, EMPTY, text_delta("b"))
        mixed = [first[0], second[0], second[1], first[1], second[2], first[2]]
        assert [one["text"] for one in streamed(*mixed)["content"]] == ["a", "b"]

    def test_done_behind_the_end_is_tolerated(self) -> None:
        assert whole(data(START, *block(0, EMPTY), END, STOP, "[DONE]"))["content"] == [EMPTY]

    @pytest.mark.parametrize("raw", ['{"to":"an', '{"to":"p q","to":"s"}', "{'a'"])
    def test_arguments_that_no_parser_agrees_on_are_kept_as_text(self, raw: str) -> None:
        message = streamed(*block(0, TOOL, json_delta(raw)))
        assert message["content"][0]["input"] == raw
        assert raw in texts(message)

    @pytest.mark.parametrize(
        "events",
        [
            block(0, EMPTY, {"type": "text_delta", "text": "", "aside": "a b"}),
            block(0, EMPTY, {"type": "of_tomorrow", "words": ["a b"]}),
            block(0, EMPTY, {"type": "of_tomorrow", "words": "a "}, {"type": "x", "words": "b"}),
            block(0, EMPTY, {"type": "citations_delta", "citation": {"cited_text": "a b"}}),
            block(0, EMPTY, {"type": "thinking_delta", "thinking": "a b"}),
            block(0, {**EMPTY, "aside": "a b"}, {"type": "x", "aside": ["c d"]}),
            block(0, {**TOOL, "input": {"k": "a b"}}, json_delta("{}")),
            block(0, {"type": "thinking", "thinking": "", "signature": "a b"})
            + block(1, EMPTY, {"type": "signature_delta", "signature": "c"}),
            [{"type": "ping", "aside": "a b"}],
            [{"type": "of_tomorrow", "content": "a b"}],
            [{"type": "message_delta", "delta": {"stop_sequence": "a b"}}],
            [{"type": "message_delta", "delta": {}, "usage": {"aside": "a b"}}],
            [{"type": "message_delta", "delta": {}, "usage": "a b"}],
        ],
    )
    def test_nothing_that_a_client_may_read_is_lost(self, events: list[Any]) -> None:
        assert "a b" in texts(streamed(*events))

    @pytest.mark.parametrize(
        "events",
        [
            [],
            ["[DONE]"],
            [START, END],
            [START, END, "[DONE]"],
            [STOP],
            [END, STOP],
            [START, START, STOP],
            [START, END, STOP, "[DONE]", "[DONE]"],
            [START, "[DONE]", STOP],
            [START, STOP, *block(0, EMPTY)],
            [START, {"type": "error", "error": {"type": "internal_error"}}],
            [START, {"type": "error", "error": {}}, STOP],
            ["{", START, STOP],
            ["[]", START, STOP],
            ["\ud800", START, STOP],
            ['{"type":"ping","type":"x"}', START, STOP],
            [{"type": 3}, START, STOP],
            [{"type": "a sentence"}, START, STOP],
            [{"type": "message_start"}, STOP],
            [{"type": "message_start", "message": {"content": [EMPTY]}}, STOP],
            [START, *block(1, EMPTY), STOP],
            [START, *block(0, "x"), STOP],
            [START, *block(0, EMPTY, "x"), STOP],
            [START, *block(0, EMPTY, {"type": "a sentence"}), STOP],
            [START, {"type": "content_block_delta", "index": 0, "delta": {}}, STOP],
            [START, {"type": "content_block_delta", "index": "0", "delta": {}}, STOP],
            [START, {"type": "message_delta", "delta": "x"}, STOP],
            [START, {"type": "message_delta", "delta": {"content": "x"}}, STOP],
        ],
    )
    def test_a_stream_that_cannot_be_read_cannot_be_judged(self, events: list[Any]) -> None:
        with pytest.raises(UpstreamMalformed):
            whole(data(*events))


WORDS = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=8)
VALUES: st.SearchStrategy[Any] = st.recursive(
    WORDS | st.integers() | st.booleans(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner),
    max_leaves=5,
)
INPUTS = st.dictionaries(st.sampled_from("abc"), VALUES, max_size=3)
BLOCKS: st.SearchStrategy[dict[str, Any]] = st.one_of(
    st.builds(lambda text: {"type": "text", "text": text}, WORDS),
    st.builds(
        lambda text, cited: {"type": "text", "text": text, "citations": [{"cited_text": cited}]},
        WORDS,
        WORDS,
    ),
    st.builds(
        lambda thought: {"type": "thinking", "thinking": thought, "signature": "f00"},
        WORDS,
    ),
    st.builds(
        lambda given: {"type": "tool_use", "id": "1", "name": "f", "input": given},
        INPUTS | st.just('{"cut": "of'),
    ),
    st.builds(lambda value: {"type": "of_tomorrow", "value": value}, VALUES),
)
BODIES: st.SearchStrategy[dict[str, Any]] = st.builds(
    lambda content, reason, details, beside: {
        **HEAD,
        "content": content,
        "stop_reason": reason,
        "stop_sequence": None,
        "usage": {"input_tokens": 1, "output_tokens": 2},
        **details,
        **beside,
    },
    st.lists(BLOCKS, max_size=4),
    st.sampled_from(["end_turn", "tool_use", None]),
    st.just({}) | st.just({"stop_details": {"type": "refusal", "explanation": "No."}}),
    st.just({}) | VALUES.map(lambda value: {"of_tomorrow": value}),
)


class TestEvents:
    @settings(max_examples=150, deadline=None)
    @given(BODIES)
    def test_a_messages_events_add_up_to_it(self, body: dict[str, Any]) -> None:
        parser = sse.EventParser()
        raw = messages_stream.encoded(messages_stream.events(body))
        came = [*parser.feed(raw), *parser.finish()]
        # Anthropic's clients go by the name in front and not by the type in the data.
        assert [event.event for event in came] == [json.loads(one.data)["type"] for one in came]
        assert whole([event.data for event in came]) == body

    def test_the_order_is_anthropics(self) -> None:
        body = {**HEAD, "content": [{"type": "text", "text": "a"}], "stop_reason": "end_turn"}
        assert [event["type"] for event in messages_stream.events(body)] == [
            "message_start",
            "content_block_start",
            "content_block_delta",
            "content_block_stop",
            "message_delta",
            "message_stop",
        ]

    def test_a_message_without_usage_gets_one_which_clients_add_to(self) -> None:
        start, *_, end, _ = messages_stream.events({**HEAD, "content": [], "usage": None})
        assert start["message"]["usage"] == {"input_tokens": 0, "output_tokens": 0}
        assert end["usage"] == {"input_tokens": 0, "output_tokens": 0}


class TestAnnotations:
    RAW = messages_stream.encoded([START, *block(0, EMPTY, text_delta("a")), END, STOP])

    @staticmethod
    def asked(*, openai: bool, azure: bool) -> Annotations:
        return Annotations("g", None, {0: None}, frozenset(), openai=openai, azure=azure)

    def test_verdicts_come_before_the_end_and_nothing_else_changes(self) -> None:
        shown = messages_stream.annotated(self.RAW, self.asked(openai=True, azure=True))
        stop = messages_stream.encoded([STOP])
        before = self.RAW.removesuffix(stop)
        assert shown.startswith(before + b"event: moderation\n")
        assert shown.endswith(stop)
        event = json.loads(shown[len(before) : -len(stop)].decode().split("data: ")[1])
        assert event.keys() == {"type", *messages_stream.ANNOTATIONS}

    def test_a_stream_is_untouched_where_none_were_asked_for(self) -> None:
        assert (
            messages_stream.annotated(self.RAW, self.asked(openai=False, azure=False)) == self.RAW
        )

    def test_an_answer_of_ours_tells_the_same_in_its_stream(self) -> None:
        asked = self.asked(openai=True, azure=False)
        body = whole(data(START, *block(0, EMPTY), END, STOP))
        raw = MESSAGES.streamed(EXCHANGE, MESSAGES.annotated(body, asked))
        events = [json.loads(line[6:]) for line in raw.decode().split("\n") if line[:5] == "data:"]
        assert events[-2] == {"type": "moderation", **messages_stream.verdicts(asked)}
        assert "moderation" not in events[0]["message"]
        assert dumps(events[-1]) == '{"type":"message_stop"}'
