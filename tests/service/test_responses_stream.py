"""Streams of the Responses dialect: what they add up to, and what real clients make of ours."""

import json
from collections.abc import Mapping
from typing import Any

import httpx
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.responses import ResponseStreamEvent
from pydantic import TypeAdapter

from service import sse
from service.errors import UpstreamMalformed
from service.exchange import Annotations, Refusal
from service.responses import ResponsesDialect
from tests.service.test_responses import ANY, call, parsed, response, said, scanned

DIALECT = ResponsesDialect()
REASONING = {
    "id": "rs_1",
    "type": "reasoning",
    "summary": [{"type": "summary_text", "text": "in short"}],
    "content": [{"type": "reasoning_text", "text": "at length"}],
    "status": "completed",
}
CALL = call('{"to":"you"}') | {"id": "fc_1", "status": "completed"}
CUSTOM = {
    "type": "custom_tool_call",
    "id": "ct_1",
    "call_id": "c2",
    "name": "run",
    "input": "ls",
}
REFUSED = said("") | {"id": "msg_2", "content": [{"type": "refusal", "refusal": "No."}]}
OTHER = {"type": "web_search_call", "id": "ws_1", "status": "completed", "action": {"query": "x y"}}
ITEMS = [said("a text"), REASONING, CALL, CUSTOM, REFUSED, OTHER]


def data_of(stream: bytes) -> list[str]:
    parser = sse.EventParser()
    return [event.data for event in (*parser.feed(stream), *parser.finish()) if event.data]


def events_of(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [json.loads(data) for data in data_of(DIALECT.streamed(parsed(), body))]


def delta(text: str, **place: Any) -> dict[str, Any]:
    return {"type": "response.output_text.delta", "delta": text, **place}


def final(*output: dict[str, Any], kind: str = "completed", **more: Any) -> dict[str, Any]:
    body = response(*output, status=kind, **more)
    return {"type": f"response.{kind}", "response": body}


def texts_of(*events: dict[str, Any]) -> list[str]:
    answer = DIALECT.parse_stream(parsed(), [json.dumps(event) for event in events])
    return [text for _, _, text in scanned(answer.choices[0].fields)]


class TestParsing:
    @pytest.mark.parametrize("kind", ["completed", "incomplete", "failed"])
    def test_the_last_response_is_the_answer(self, kind: str) -> None:
        events = [delta("a te"), delta("xt"), final(said("a text"), kind=kind)]
        answer = DIALECT.parse_stream(parsed(), [json.dumps(event) for event in events])
        assert answer.body == response(said("a text"), status=kind)
        assert scanned(answer.choices[0].fields) == [("text", "response", "a text")]

    def test_a_last_word_of_another_dialect_does_no_harm(self) -> None:
        answer = DIALECT.parse_stream(parsed(), [json.dumps(final(said("a"))), "[DONE]"])
        assert answer.completion_tokens == 2

    @pytest.mark.parametrize(
        ("events", "text"),
        [
            ([delta("bad "), delta("words")], "bad words"),
            (
                [
                    delta("bad ", output_index=0),
                    delta("x", output_index=1),
                    delta("words", output_index=0),
                ],
                "bad words",
            ),
            ([{"type": "response.output_text.done", "text": "bad words"}], "bad words"),
            ([{"type": "response.output_text.done", "text": "bad"}], "bad"),
            ([{"type": "response.output_item.done", "item": said("bad words")}], "bad words"),
            ([{"type": "response.created", "response": response(said("bad words"))}], "bad words"),
            ([{"type": "new", "deep": [{"er": "bad words"}]}], "bad words"),
            ([{"type": "new", "bad words": 1}], "bad words"),
            ([{"type": "bad words"}], "bad words"),
            ([{"type": "x", "delta": {"content": "bad words"}}], "bad words"),
            (
                [
                    {"type": "response.function_call_arguments.delta", "delta": '{"a":"b\\u0061'},
                    {"type": "response.function_call_arguments.delta", "delta": 'd words"}'},
                ],
                "a\nbad words",
            ),
        ],
    )
    def test_what_was_streamed_and_is_not_in_the_end_is_judged(
        self, events: list[dict[str, Any]], text: str
    ) -> None:
        assert texts_of(*events, final(said("good")))[0] == "good"
        assert text in texts_of(*events, final(said("good")))
        # Also where it comes after the end.
        assert text in texts_of(final(said("good")), *events)

    def test_what_a_client_said_is_judged_where_the_model_says_it(self) -> None:
        """It stands in the final response, but as the request's words, not as the answer's."""
        events = [delta("be cruel to all"), final(said("a"), instructions="be cruel to all")]
        exchange = parsed(instructions="be cruel to all")
        answer = DIALECT.parse_stream(exchange, [json.dumps(event) for event in events])
        assert ("text", "response", "be cruel to all") in scanned(answer.choices[0].fields)

    @pytest.mark.parametrize(
        "event",
        [
            {"type": "response.audio.delta", "delta": "UklGR"},
            {"type": "response.output_item.done", "item": {"encrypted_content": "x"}},
            {"type": "x", "partial_image_b64": "iVBO"},
        ],
    )
    def test_what_nobody_can_read_is_named(self, event: dict[str, Any]) -> None:
        answer = DIALECT.parse_stream(parsed(), [json.dumps(event), json.dumps(final())])
        assert answer.unscannable

    @given(
        st.integers(min_value=0, max_value=30),
        st.sampled_from(["text", "delta", "item", "part", "name", "id", "x_new", "response"]),
        ANY,
    )
    def test_no_sentence_of_a_stream_escapes(self, place: int, key: str, value: Any) -> None:
        events = events_of(response(*ITEMS))[:-1]
        events[place % len(events)][key] = value
        planted = [text for text in strings_in(value) if " " in text]
        found = "\n".join(texts_of(*events, final(*ITEMS)))
        assert not [text for text in planted if text not in found]

    @pytest.mark.parametrize(
        "events",
        [
            [],
            ["[DONE]"],
            ["{"],
            ["[]"],
            ["{}"],
            ['{"type":3}'],
            [json.dumps(delta("a"))],
            ['{"type":"error","message":"x"}', json.dumps(final())],
            ['{"type":"response.completed"}'],
            ['{"type":"response.completed","response":[]}'],
            [json.dumps(final()), json.dumps(final())],
            ['{"type":"x","text":"bad","text":"good"}', json.dumps(final())],
        ],
    )
    def test_a_stream_that_cannot_be_read_cannot_be_judged(self, events: list[str]) -> None:
        with pytest.raises(UpstreamMalformed):
            DIALECT.parse_stream(parsed(), events)


def strings_in(value: Any) -> list[str]:
    """All strings, keys included."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list):
        return [text for item in value for text in strings_in(item)]
    if isinstance(value, dict):
        return [*value, *strings_in([*value.values()])]
    return []


def client(stream: bytes) -> openai.OpenAI:
    """The real client, before an upstream that answers ``stream``."""
    headers = {"content-type": "text/event-stream"}
    transport = httpx.MockTransport(lambda _: httpx.Response(200, content=stream, headers=headers))
    # Newer versions of the client name another package's type, and take either.
    http_client: Any = httpx.Client(transport=transport)
    return openai.OpenAI(api_key="k", http_client=http_client, max_retries=0)


class TestRendering:
    @given(st.lists(st.sampled_from(ITEMS), unique_by=lambda item: item["id"]))
    def test_a_rendered_stream_adds_up_to_the_answer(self, items: list[dict[str, Any]]) -> None:
        body = response(*items)
        answer = DIALECT.parse_stream(parsed(), data_of(DIALECT.streamed(parsed(), body)))
        assert answer == DIALECT.parse_answer(parsed(), body)

    def test_a_client_adds_it_up(self) -> None:
        body = response(*ITEMS)
        with client(DIALECT.streamed(parsed(), body)).responses.stream(
            model="m", input="q"
        ) as stream:
            events = list(stream)
            read = stream.get_final_response()
        texts = [event.delta for event in events if event.type == "response.output_text.delta"]
        assert "".join(texts) == read.output_text == "a text"
        kinds = [event.type for event in events]
        for kind in ("reasoning_text", "function_call_arguments", "refusal"):
            assert f"response.{kind}.delta" in kinds
            assert f"response.{kind}.done" in kinds
        assert [item.type for item in read.output] == [item["type"] for item in ITEMS]

    def test_every_event_is_one_of_the_formats(self) -> None:
        """The client is lenient, its types are not."""
        events = events_of(response(*ITEMS[:-1]))
        for number, event in enumerate(events):
            read = TypeAdapter[Any](ResponseStreamEvent).validate_python(event)
            assert read.type == event["type"]
            assert read.sequence_number == number
        names = DIALECT.streamed(parsed(), response(*ITEMS[:-1])).decode().splitlines()
        assert [line[7:] for line in names if line.startswith("event: ")] == [
            event["type"] for event in events
        ]

    def test_an_error_in_a_stream_is_an_event_of_its_own_type(self) -> None:
        (data,) = data_of(DIALECT.error_event(UpstreamMalformed("it broke"), "id1"))
        read = TypeAdapter[Any](ResponseStreamEvent).validate_python(json.loads(data))
        assert (read.type, read.message) == ("error", "it broke")
        assert DIALECT.error_event(UpstreamMalformed("it broke"), "id1").startswith(
            b"event: error\n"
        )

    @pytest.mark.parametrize("finish_reason", ["stop", "content_filter"])
    def test_a_client_reads_a_refusal(self, finish_reason: Any) -> None:
        exchange = parsed(stream=True)
        answer = DIALECT.refused(exchange, "id1", 7, Refusal("No.", finish_reason))
        stream = DIALECT.streamed(exchange, answer.body)
        events = list(client(stream).responses.create(model="m", input="q", stream=True))
        end = events[-1]
        assert end.type in ("response.completed", "response.incomplete")
        assert (end.type == "response.incomplete") == (finish_reason == "content_filter")
        assert end.response.output_text == "No."

    def test_verdicts_stand_in_the_last_event_and_the_rest_stays_as_it_came(self) -> None:
        raw = b": hello\n\n" + DIALECT.streamed(parsed(), response(said("a")))
        asked = Annotations("guard", None, {0: None}, frozenset(), openai=True, azure=True)
        shown = DIALECT.annotated_stream(raw, asked)
        start = raw.index(b"event: response.completed")
        assert shown.startswith(raw[:start])
        last = json.loads(data_of(shown)[-1])
        assert last["response"] == DIALECT.annotated(response(said("a")), asked)

    def test_a_stream_of_our_own_tells_verdicts_at_the_end_only(self) -> None:
        body = response(said("a"), moderation={"input": "x"})
        first, *_, last = events_of(body)
        assert "moderation" not in first["response"]
        assert last["response"]["moderation"] == {"input": "x"}
