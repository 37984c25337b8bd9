"""The reader of a Messages stream: what it hears, and how it ends a stream before its end."""

import json
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import anthropic
import httpx2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service import messages_stream, sse
from service.errors import BadRequest, UpstreamMalformed
from service.exchange import Choice, Heard
from service.extractor import unescaped
from service.messages import MessagesDialect
from service.messages_reader import MessagesReader
from service.sse import Event

MESSAGES = MessagesDialect()
EXCHANGE = MESSAGES.parse(
    {
        "model": "m",
        "max_tokens": 9,
        "stream": True,
        "messages": [{"role": "user", "content": "q"}],
    }
)
START: dict[str, Any] = {
    "type": "message_start",
    "message": {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": "m",
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": {"input_tokens": 3, "output_tokens": 1},
    },
}
END = {
    "type": "message_delta",
    "delta": {"stop_reason": "end_turn", "stop_sequence": None},
    "usage": {"input_tokens": 3, "output_tokens": 4},
}
STOP = {"type": "message_stop"}
PING = {"type": "ping"}
TEXT = {"type": "text", "text": ""}
TOOL = {"type": "tool_use", "id": "t", "name": "send", "input": {}}
THOUGHT = {"type": "thinking", "thinking": "", "signature": ""}
SENTENCE = "a planted sentence"


def text(piece: str) -> dict[str, Any]:
    return {"type": "text_delta", "text": piece}


def thought(piece: str) -> dict[str, Any]:
    return {"type": "thinking_delta", "thinking": piece}


def partial(piece: str) -> dict[str, Any]:
    return {"type": "input_json_delta", "partial_json": piece}


def block(index: int, start: Any, *deltas: Any) -> list[dict[str, Any]]:
    return [
        {"type": "content_block_start", "index": index, "content_block": start},
        *({"type": "content_block_delta", "index": index, "delta": delta} for delta in deltas),
        {"type": "content_block_stop", "index": index},
    ]


def events(*said: Any) -> list[Event]:
    """Objects as events with their type in front, strings as bare data."""
    raw = b"".join(
        sse.encode(one) if isinstance(one, str) else messages_stream.encoded([one]) for one in said
    )
    return sse.EventParser().feed(raw)


def heard(*said: Any) -> list[Heard]:
    reader = MESSAGES.reader(EXCHANGE)
    return [reader.hear(event) for event in events(*said)]


def tracks(found: Sequence[Heard]) -> dict[tuple[str, str], str]:
    """What was said, by name and track."""
    result: dict[tuple[str, str], str] = defaultdict(str)
    for said in [said for one in found for said in one.said]:
        assert said.choice == 0
        result[said.name, said.track] += said.text
    return dict(result)


def message(raw: bytes) -> dict[str, Any]:
    """The message of a complete stream."""
    return messages_stream.whole([event.data for event in sse.EventParser().feed(raw)])


class TestHear:
    def test_each_text_is_said_in_the_event_that_carries_it(self) -> None:
        stream = [
            START,
            PING,
            *block(0, THOUGHT, thought("h"), thought("m"), {"type": "x", "signature": "f00"}),
            *block(1, TEXT, text("Par"), text("is.")),
            *block(2, TOOL, partial('{"to":"a'), partial('nn"}')),
            *block(3, TEXT, text("Sent.")),
            END,
            STOP,
        ]
        found = heard(*stream)
        assert tracks(found) == {
            ("reasoning", "content[].thinking"): "hm",
            ("text", "content[].text"): "Paris.\nSent.",
            ("tool_call", "content[2]"): 'send\n{"to":"ann"}',
        }
        assert [[said.text for said in one.said] for one in found[8:10]] == [["Par"], ["is."]]

    def test_the_end_is_told_by_its_reason_and_the_last_event(self) -> None:
        delta = {"type": "message_delta", "delta": {}, "usage": {"output_tokens": 2}}
        found = heard(START, *block(0, TEXT, text("a")), delta, END, STOP, "[DONE]")
        assert [bool(one.ends) for one in found] == [False] * 5 + [True] * 3
        assert [one.is_last for one in found] == [False] * 6 + [True, False]
        assert {one.choices for one in found} == {frozenset({0})}

    def test_an_event_without_a_type_in_front_is_read_by_its_data(self) -> None:
        found = heard(json.dumps(START), *map(json.dumps, block(0, TEXT, text("a"))))
        assert tracks(found) == {("text", "content[].text"): "a"}

    def test_comments_and_pings_say_nothing(self) -> None:
        reader = MESSAGES.reader(EXCHANGE)
        raw = sse.comment("x") + MESSAGES.keep_alive + b"event: ping\n\n"
        assert [reader.hear(event).said for event in sse.EventParser().feed(raw)] == [(), (), ()]
        assert MESSAGES.keep_alive == b'event: ping\ndata: {"type": "ping"}\n\n'

    def test_blocks_that_come_by_turns_do_not_tear_each_other_apart(self) -> None:
        first = block(0, TEXT, text("sev"), text("er"), text("e"))
        second = block(1, TEXT, text("fine"))
        found = heard(START, *first[:2], *second[:2], *first[2:])
        assert tracks(found) == {
            ("text", "content[].text"): "sev\nfine",
            ("text", "content[0].text"): "severe",
        }

    @pytest.mark.parametrize(
        "said",
        [
            [{**PING, "aside": SENTENCE}],
            [{"type": "of_tomorrow", "content": [{"x": SENTENCE}]}],
            [{**START, "aside": SENTENCE}],
            [{**START, "message": {**START["message"], "aside": {SENTENCE: 1}}}],
            [{**START, "message": {**START["message"], "model": SENTENCE}}],
            [START, *block(0, {**TEXT, "aside": [SENTENCE]})],
            [START, *block(0, {**TEXT, "text": SENTENCE})],
            [START, *block(0, {**THOUGHT, "signature": SENTENCE})],
            [START, *block(0, {**TOOL, "name": SENTENCE})],
            [START, *block(0, {**TOOL, "input": {"to": SENTENCE}})],
            [START, *block(0, {**TOOL, "id": SENTENCE})],
            [START, *block(0, {"type": "of_tomorrow", "value": SENTENCE})],
            [START, *block(0, {"type": SENTENCE})],
            [START, *block(0, {"type": "web_search_tool_result", "content": SENTENCE})],
            [START, *block(0, TEXT, {"type": "citations_delta", "citation": {"t": SENTENCE}})],
            [START, *block(0, TEXT, {"type": "of_tomorrow", SENTENCE: None})],
            [START, *block(0, TEXT, {"type": "x", "words": "a pla"}, {"type": "x", "words": "n"})],
            [START, *block(0, TEXT, thought(SENTENCE))],
            [START, *block(0, TEXT, partial(SENTENCE))],
            [START, *block(0, {"type": "of_tomorrow"}, {"type": "x", "words": SENTENCE})],
            [START, {**block(0, TEXT)[0], "aside": SENTENCE}],
            [START, *block(0, TEXT)[:2], {**block(0, TEXT)[1], "aside": SENTENCE}],
            [START, {"type": "message_delta", "delta": {"stop_details": {"t": SENTENCE}}}],
            [START, {"type": "message_delta", "delta": {"stop_sequence": SENTENCE}}],
            [START, {"type": "message_delta", "usage": SENTENCE}],
            [START, {"type": "message_delta", "usage": {"aside": SENTENCE}}],
            [START, END, {**STOP, "aside": SENTENCE}],
        ],
    )
    def test_a_sentence_is_said_wherever_it_stands(self, said: list[Any]) -> None:
        found = "".join(tracks(heard(*said)).values())
        assert SENTENCE in found or "a plan" in found

    @pytest.mark.parametrize(
        "said",
        [
            block(0, {"type": "redacted_thinking", "data": "f00"}),
            block(0, {"type": "image", "source": {"data": "f00"}}),
            block(0, {"type": "of_tomorrow"}, {"type": "x", "data": "f00"}),
            block(0, TEXT, {"type": "x", "token_ids": [1, 2]}),
        ],
    )
    def test_what_no_guard_reads_is_told(self, said: list[Any]) -> None:
        found = [path for one in heard(START, *said) for path in one.unscannable]
        assert len(found) == 1
        assert found[0].startswith("content[0]")

    @pytest.mark.parametrize(
        "said",
        [
            [START, {"type": "error", "error": {"type": "overloaded_error"}}],
            [START, "{"],
            [START, "[DONE]"],
            [END],
            [STOP],
            [START, START],
            [START, END, STOP, STOP],
            [START, END, STOP, "[DONE]", "[DONE]"],
            [START, END, STOP, "[DONE]", PING],
            [START, END, STOP, {**PING, "aside": "x"}],
            [START, END, STOP, block(0, TEXT)[0]],
            [START, END, block(0, TEXT)[0]],
            [START, *block(0, TEXT), END, block(0, TEXT, text("a"))[1]],
            [START, block(1, TEXT)[0]],
            [START, block(0, {"text": ""})[0]],
            [START, *block(0, TEXT, {"type": "text_delta", "text": ["a"]})[:2]],
            [START, *block(0, TEXT, {"type": "a sentence"})[:2]],
        ],
    )
    def test_what_cannot_be_read_is_refused_at_its_last_event(self, said: list[Any]) -> None:
        *before, last = events(*said)
        reader = MESSAGES.reader(EXCHANGE)
        for event in before:
            reader.hear(event)
        with pytest.raises(UpstreamMalformed):
            reader.hear(last)

    @pytest.mark.parametrize(
        "raw",
        [
            b'event: message_stop\ndata: {"type":"ping"}\n\n',
            b'event: error\ndata: {"type":"ping"}\n\n',
            b"event: error\n\n",
        ],
    )
    def test_a_type_in_front_that_is_not_the_datas_is_refused(self, raw: bytes) -> None:
        # Some clients go by the one, some by the other.
        (event,) = sse.EventParser().feed(raw)
        with pytest.raises(UpstreamMalformed):
            MESSAGES.reader(EXCHANGE).hear(event)

    def test_a_stream_without_its_end_has_no_answer(self) -> None:
        reader = MESSAGES.reader(EXCHANGE)
        for event in events(START, *block(0, TEXT, text("a")), END):
            reader.hear(event)
        with pytest.raises(UpstreamMalformed):
            reader.answer()


WORDS = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=8)
PIECES = st.lists(WORDS, max_size=4)
ASIDES = st.sampled_from([[], [{"type": "of_tomorrow", "aside": "a b"}]])
BLOCKS: st.SearchStrategy[tuple[dict[str, Any], list[dict[str, Any]]]] = st.one_of(
    st.builds(
        lambda first, pieces, more: ({**TEXT, "text": first}, [*map(text, pieces), *more]),
        WORDS,
        PIECES,
        ASIDES,
    ),
    st.builds(
        lambda pieces: (THOUGHT, [*map(thought, pieces), {"type": "x", "signature": "f00"}]), PIECES
    ),
    st.builds(
        lambda given, cuts: (TOOL, [partial(piece) for piece in split(json.dumps(given), cuts)]),
        st.dictionaries(st.sampled_from("abc"), WORDS, max_size=2),
        st.lists(st.integers(0, 40), max_size=3),
    ),
)


def split(whole: str, cuts: list[int]) -> list[str]:
    ends = [0, *sorted(min(cut, len(whole)) for cut in cuts), len(whole)]
    return [whole[start:end] for start, end in pairwise(ends)]


def stream_of(blocks: list[tuple[dict[str, Any], list[dict[str, Any]]]]) -> list[dict[str, Any]]:
    inner = [one for i, (start, deltas) in enumerate(blocks) for one in block(i, start, *deltas)]
    return [START, *inner, END, STOP]


STREAMS = st.lists(BLOCKS, max_size=4).map(stream_of)


def solid(said: str) -> str:
    """Blank lines tell nothing: an empty block has one in a whole answer, and none here."""
    return "\n".join(line for line in said.split("\n") if line.strip())


KEYS = st.sampled_from(
    [
        "cache_control", "citation", "content", "content_block", "data", "delta", "id", "index",
        "input", "message", "model", "name", "of_tomorrow", "partial_json", "signature", "source",
        "stop_reason", "stop_sequence", "text", "thinking", "token_ids", "usage", SENTENCE,
    ]
)  # fmt: skip
PLANTS: st.SearchStrategy[Any] = st.sampled_from(
    [SENTENCE, [SENTENCE], {"x": SENTENCE}, {SENTENCE: 1}, [{"type": "text", "text": SENTENCE}]]
)


def objects_in(value: Any) -> list[dict[str, Any]]:
    """All objects in a JSON value."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    own = [value] if isinstance(value, dict) else []
    return own + [found for one in inner for found in objects_in(one)]


class TestStreams:
    @settings(max_examples=300, deadline=None)
    @given(STREAMS, KEYS, PLANTS, st.data())
    def test_a_sentence_under_any_key_is_said_told_of_or_refused(
        self, said: list[Any], key: str, plant: Any, data: st.DataObject
    ) -> None:
        said = json.loads(json.dumps(said))
        number = data.draw(st.integers(0, len(said) - 1))
        data.draw(st.sampled_from(objects_in(said[number])))[key] = plant
        reader = MESSAGES.reader(EXCHANGE)
        came = events(*said[: number + 1])
        for event in came[:-1]:
            reader.hear(event)
        try:
            found = reader.hear(came[-1])
        except (UpstreamMalformed, BadRequest):
            return
        assert found.unscannable or any(SENTENCE in one.text for one in found.said)

    @settings(max_examples=150, deadline=None)
    @given(STREAMS)
    def test_what_is_said_is_what_a_whole_answer_is_judged_by(self, said: list[Any]) -> None:
        came = events(*said)
        reader = MESSAGES.reader(EXCHANGE)
        found = tracks([reader.hear(event) for event in came])
        answer = MESSAGES.parse_stream(EXCHANGE, [event.data for event in came])
        assert reader.answer() == answer
        expected = {field.name: solid(field.judged.text) for field in answer.choices[0].fields}
        for name in ("text", "reasoning"):
            mine = "".join(one for (kind, _), one in found.items() if kind == name)
            assert solid(mine) == expected.get(name, "")
        for field in answer.choices[0].fields:
            if field.name == "tool_call":
                raw = found["tool_call", field.path].partition("\n")[2]
                assert ["send", *solid_strings(json.loads(raw))] == field.judged.text.split("\n")
            if field.name == "other":
                assert "a b" in "".join(found.values())

    @settings(max_examples=150, deadline=None)
    @given(STREAMS, st.data())
    def test_a_stream_that_is_cut_is_complete_and_says_what_was_sent(
        self, said: list[Any], data: st.DataObject
    ) -> None:
        came = events(*said)
        # What was heard and not sent leaves no trace.
        n_heard = data.draw(st.integers(1, len(came)))
        n_sent = data.draw(st.integers(1, n_heard))
        reader = MESSAGES.reader(EXCHANGE)
        for event in came[:n_heard]:
            reader.hear(event)
        for event in came[:n_sent]:
            reader.sent(event)
        sent = b"".join(event.raw for event in came[:n_sent])
        closing = reader.cut(0)
        assert reader.end() == b""
        assert (sent + closing).count(b"event: message_stop\n") == 1
        found = message(sent + closing)
        is_complete = n_sent >= len(came) - 1
        assert found["stop_reason"] == ("end_turn" if is_complete else "refusal")
        starts = sum(one["type"] == "content_block_start" for one in said[:n_sent])
        assert len(found["content"]) == starts
        # The same as if the events that were sent had been the whole stream.
        parts = [one for one in said[:n_sent] if one["type"].startswith("content_block")]
        only = messages_stream.whole([json.dumps(one) for one in (START, *parts, END, STOP)])
        assert found["content"] == only["content"]
        stops = [json.loads(event.data) for event in sse.EventParser().feed(sent + closing)]
        indexes = [one["index"] for one in stops if one["type"] == "content_block_stop"]
        assert indexes == list(range(starts))


def solid_strings(given: dict[str, str]) -> list[str]:
    both = "\n".join(text for pair in given.items() for text in pair if text.strip())
    return both.split("\n") if both else []


class TestCut:
    @staticmethod
    def cut(sent: list[Any], held: Sequence[Any] = ()) -> list[dict[str, Any]]:
        """What ends a stream of which ``sent`` went out and ``held`` was only heard."""
        reader = MESSAGES.reader(EXCHANGE)
        for event in events(*sent, *held):
            reader.hear(event)
        for event in events(*sent):
            reader.sent(event)
        closing = [json.loads(event.data) for event in sse.EventParser().feed(reader.cut(0))]
        assert reader.end() == b""
        return closing

    def test_the_open_block_stops_and_the_message_is_refused(self) -> None:
        sent = [START, *block(0, TEXT, text("a"))[:2]]
        closing = self.cut(sent, [*block(0, TEXT, text("b"))[1:], *block(1, TEXT), END])
        assert closing == [
            {"type": "content_block_stop", "index": 0},
            {
                "type": "message_delta",
                "delta": {"stop_reason": "refusal", "stop_sequence": None},
                "usage": {"output_tokens": 4},
            },
            {"type": "message_stop"},
        ]

    def test_a_message_that_has_only_begun_is_completed(self) -> None:
        delta, stop = self.cut([PING, START])
        assert delta["usage"] == {"output_tokens": 1}
        assert stop == {"type": "message_stop"}

    def test_only_what_is_missing_is_sent(self) -> None:
        assert self.cut([START, *block(0, TEXT), END]) == [{"type": "message_stop"}]
        assert self.cut([START, *block(0, TEXT), END, STOP, "[DONE]"]) == []

    def test_the_end_completes_what_was_not_cut(self) -> None:
        reader = MESSAGES.reader(EXCHANGE)
        assert reader.end() == b""
        for event in events(START, *block(0, TEXT), END):
            reader.hear(event)
            reader.sent(event)
        assert reader.end() == messages_stream.encoded([STOP])
        assert reader.end() == b""

    def test_a_usage_that_is_none_counts_nothing(self) -> None:
        start = {**START, "message": {"content": [], "usage": {"output_tokens": "many"}}}
        assert self.cut([start])[0]["usage"] == {"output_tokens": 0}

    def test_one_choice_has_no_other_beside_it(self) -> None:
        reader = MESSAGES.reader(EXCHANGE)
        (event,) = events(START)
        assert reader.without(event, frozenset({0})) == b""
        assert reader.without(event, frozenset()) == event.raw
        with pytest.raises(AssertionError):
            reader.spoken(Choice(0, (), {}))


class TestAnthropicsClient:
    """Their own client reads what was sent, and then our end."""

    @staticmethod
    def read(raw: bytes) -> anthropic.types.Message:
        def answer(_: httpx2.Request) -> httpx2.Response:
            return httpx2.Response(200, headers={"content-type": "text/event-stream"}, content=raw)

        http = httpx2.Client(transport=httpx2.MockTransport(answer))
        client = anthropic.Anthropic(api_key="k", base_url="http://upstream", http_client=http)
        with client.messages.stream(
            model="m", max_tokens=9, messages=[{"role": "user", "content": "q"}]
        ) as stream:
            return stream.get_final_message()

    @staticmethod
    def cut(*said: Any) -> bytes:
        reader: MessagesReader = MESSAGES.reader(EXCHANGE)
        came = events(*said)
        for event in came:
            reader.hear(event)
            reader.sent(event)
        return MESSAGES.keep_alive + b"".join(event.raw for event in came) + reader.cut(0)

    def test_a_text_that_was_cut(self) -> None:
        found = self.read(self.cut(START, *block(0, TEXT, text("Par"), text("is"))[:3]))
        assert [one.text for one in found.content if one.type == "text"] == ["Paris"]
        assert found.stop_reason == "refusal"
        assert found.usage.output_tokens == 1

    def test_a_call_that_was_cut(self) -> None:
        said = [*block(0, THOUGHT, thought("hm")), *block(1, TOOL, partial('{"to":["an"'))[:2]]
        found = self.read(self.cut(START, *said))
        assert [one.type for one in found.content] == ["thinking", "tool_use"]
        assert [one.input for one in found.content if one.type == "tool_use"] == [{"to": ["an"]}]
        assert found.stop_reason == "refusal"

    def test_a_message_that_had_only_begun(self) -> None:
        found = self.read(self.cut(START))
        assert found.content == []
        assert found.stop_reason == "refusal"


def test_escapes_in_a_calls_pieces_are_what_a_judgement_undoes() -> None:
    found = heard(START, *block(0, {**TOOL, "input": {"to": 'a "b" c'}}, partial("{}")))
    assert 'a "b" c' in unescaped(tracks(found)["tool_call", "content[0]"])
