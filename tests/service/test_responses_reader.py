"""The reader of Responses streams: what each event says, and streams that end before their end."""

import json
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types.responses import ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter

from service import extractor, sse
from service.errors import BadRequest, UpstreamMalformed
from service.exchange import Choice, Exchange, Heard, Said, StreamReader
from service.responses import ResponsesDialect
from service.sse import Event
from tests.service.test_responses import call, parsed, response, said
from tests.service.test_responses_stream import ITEMS, client, delta, events_of, final

DIALECT = ResponsesDialect()
BAD = "bad words here"
REFUSED_PART = {"type": "refusal", "refusal": "Not that."}
MIXED = said("one text", "msg_3")
MIXED["content"] = [*MIXED["content"], REFUSED_PART]
ALL_ITEMS = [*ITEMS, MIXED]
OUTPUTS = st.lists(st.sampled_from(ALL_ITEMS), unique_by=lambda item: item["id"])
CREATED = {"type": "response.created", "response": response(status="in_progress", usage=None)}


def event_of(value: Mapping[str, Any]) -> Event:
    (event,) = sse.EventParser().feed(sse.encode(json.dumps(value), str(value["type"])))
    return event


def chopped(events: Sequence[Mapping[str, Any]], chance: random.Random) -> list[dict[str, Any]]:
    """The same stream with its deltas cut anywhere, and numbered anew."""
    found: list[dict[str, Any]] = []
    for event in events:
        text = event.get("delta")
        if not isinstance(text, str):
            found.append(dict(event))
            continue
        while text:
            size = chance.randint(1, len(text))
            found.append({**event, "delta": text[:size]})
            text = text[size:]
    return [{**event, "sequence_number": number} for number, event in enumerate(found)]


def heard(reader: StreamReader, *values: Mapping[str, Any]) -> list[Heard]:
    return [reader.hear(event_of(value)) for value in values]


def said_by(*values: Mapping[str, Any], exchange: Exchange | None = None) -> list[Said]:
    reader = DIALECT.reader(exchange or parsed())
    return [one for each in heard(reader, *values) for one in each.said]


def tracks(found: Sequence[Said]) -> dict[str, str]:
    joined: dict[str, str] = defaultdict(str)
    for one in found:
        joined[one.track] += one.text
    return joined


def shown_text(events: Sequence[Mapping[str, Any]]) -> str:
    return "".join(e["delta"] for e in events if e["type"] == "response.output_text.delta")


def values_of(raw: bytes) -> list[dict[str, Any]]:
    parser = sse.EventParser()
    return [json.loads(event.data) for event in (*parser.feed(raw), *parser.finish())]


class TestHearing:
    @given(OUTPUTS, st.randoms())
    def test_a_stream_says_what_its_answer_does(self, items: Any, chance: random.Random) -> None:
        events = chopped(events_of(response(*items)), chance)
        reader = DIALECT.reader(parsed())
        every = [one for each in heard(reader, *events) for one in each.said]
        joined = tracks(every)
        answer = DIALECT.parse_stream(parsed(), [json.dumps(event) for event in events])
        fields = answer.choices[0].fields
        for field in fields:
            parts = [
                extractor.unescaped(text)
                for track, text in joined.items()
                if track.startswith(field.path)
            ]
            assert all(any(line in part for part in parts) for line in field.judged.text.split())
        # Nothing was said twice: all of it together is no longer than the texts and their marks.
        assert sum(len(text) for text in joined.values()) <= sum(
            len(field.judged.text) + 20 for field in fields
        )
        assert reader.answer() == answer

    def test_texts_run_in_tracks_of_their_own(self) -> None:
        events = events_of(response(*ALL_ITEMS))
        assert dict(tracks(said_by(*events))) == {
            "output[0].content[0].text": "a text",
            "output[1].summary[0].text": "in short",
            "output[1].content[0].text": "at length",
            "output[2].arguments": 'send\n{"to":"you"}',
            "output[3].input": "run\nls",
            "output[4].content[0].refusal": "No.",
            "output[5]": "query\nx y",
            "output[6].content[0].text": "one text",
            "output[6].content[1].refusal": "Not that.",
        }
        names = {one.track: one.name for one in said_by(*events)}
        assert names["output[0].content[0].text"] == "text"
        assert names["output[1].summary[0].text"] == "reasoning"
        assert names["output[2].arguments"] == names["output[3].input"] == "tool_call"
        assert names["output[4].content[0].refusal"] == "refusal"

    @pytest.mark.parametrize(
        ("events", "texts"),
        [
            ([delta("a"), delta("a")], ["a", "a"]),
            ([delta(" ")], [" "]),
            ([delta("a b c"), {"type": "response.output_text.done", "text": "b"}], ["a b c"]),
            ([delta("a"), {"type": "response.output_text.done", "text": "ab"}], ["a", "b"]),
            ([delta("a"), {"type": "response.output_text.done", "text": BAD}], ["a", f"\n{BAD}"]),
            ([{"type": "response.output_text.done", "text": BAD}], [BAD]),
            ([{"type": "x.delta", "delta": "a"}, {"type": "x.delta", "delta": "a"}], ["a", "a"]),
            ([{"type": "x", "delta": {"text": "a"}}] * 2, ["a", "a"]),
            ([{"type": "x", BAD: None}], [f"{BAD}\n"]),
            ([{"type": BAD}], [BAD]),
            ([delta("a", item_id=BAD)], ["a", BAD]),
            ([delta("a", output_index=BAD)], ["a", BAD]),
            ([delta("a", obfuscation="xYz", item_id="msg_1")], ["a"]),
            ([{"type": "response.created", "response": response(status=BAD)}], [BAD]),
            ([{"type": "response.created", "response": {"output": [said(BAD)]}}], [BAD]),
            ([final(said(BAD))], [BAD]),
            (
                [final(error={"code": "x", "message": BAD}, kind="failed")],
                [f"code\nx\nmessage\n{BAD}"],
            ),
            (
                [
                    {"type": "response.function_call_arguments.delta", "delta": '{"a":'},
                    {"type": "response.function_call_arguments.done", "arguments": '{"a":1}'},
                ],
                ['{"a":', "1}"],
            ),
        ],
    )  # fmt: skip
    def test_what_an_event_says(self, events: list[dict[str, Any]], texts: list[str]) -> None:
        assert [one.text for one in said_by(*events)] == texts

    @pytest.mark.parametrize(
        ("logprobs", "texts"),
        [
            ([{"token": "a b", "logprob": -1.0, "bytes": [97, 32, 98], "top_logprobs": []}], []),
            ([{"token": "a", "bytes": [97]}, {"token": " b", "bytes": [32, 98]}], []),
            ([{"token": "a"}, {"token": " b"}, {"token": "<|end|>"}], ["<|end|>"]),
            ([{"token": BAD}], [BAD]),
            ([{"token": "a", "bytes": list(BAD.encode())}], [BAD]),
            ([{"token": "a", "top_logprobs": [{"token": "other"}]}], []),
            ([{"token": "a", "top_logprobs": [{"token": BAD}]}], [BAD]),
            ([{"token": "a", "top_logprobs": [{"token": "b", "new": BAD}]}], [BAD]),
            ([{"token": "a", "logprob": BAD}], [BAD]),
            ({"content": BAD}, [BAD]),
            (BAD, [BAD]),
            ([BAD], [BAD]),
        ],
    )
    def test_tokens_pass_with_their_text_and_no_further(
        self, logprobs: Any, texts: list[str]
    ) -> None:
        found = said_by(delta("a b", logprobs=logprobs, token_ids=[1, 2]))
        assert [one.text for one in found] == ["a b", *texts]
        part = {"type": "output_text", "text": "a b", "logprobs": logprobs}
        whole = {"type": "response.content_part.done", "part": part}
        assert [one.text for one in said_by(whole)] == ["a b", *texts]

    def test_what_repeats_the_request_is_not_said(self) -> None:
        exchange = parsed(instructions="be kind to all", metadata={"a": "some words"})
        echoed = response(
            instructions="be kind to all", metadata={"a": "some words"}, status="queued"
        )
        created = {"type": "response.created", "response": echoed}
        assert said_by(created, exchange=exchange) == []
        assert said_by(created) != []
        assert len(said_by(created, {**created, "type": "response.in_progress"})) == 1

    @pytest.mark.parametrize(
        "event",
        [
            {"type": "response.audio.delta", "delta": "UklGR"},
            {"type": "x", "partial_image_b64": "iVBO"},
            {"type": "x", "deep": [{"encrypted_content": "x"}]},
            {"type": "response.output_item.done", "item": {"type": "x", "encrypted_content": "x"}},
            {"type": "response.output_item.done", "item": {"type": "image_generation_call"}},
            {"type": "response.content_part.added", "part": {"type": "output_image"}},
        ],
    )
    def test_what_nobody_can_read_is_named(self, event: dict[str, Any]) -> None:
        (found,) = heard(DIALECT.reader(parsed()), event)
        assert found.unscannable
        assert not found.said

    @given(OUTPUTS, st.randoms())
    def test_a_sentence_under_any_key_is_said_with_its_event(
        self, items: Any, chance: random.Random
    ) -> None:
        events = deepcopy(chopped(events_of(response(*items)), chance))
        number = chance.randrange(len(events))
        spot = chance.choice(list(containers(events[number])))
        key = chance.choice([*spot, "x_new", "logprobs", "token_ids", "bytes", BAD])
        spot[key] = chance.choice([BAD, [BAD], {"deep": [{"er": BAD}]}])
        reader = DIALECT.reader(parsed())
        heard(reader, *events[:number])
        try:
            (found,) = heard(reader, events[number])
        except (UpstreamMalformed, BadRequest):
            return
        texts = [extractor.unescaped(one.text) for one in found.said]
        assert found.unscannable or any(BAD in text for text in texts)

    def test_an_end_ends_the_choice_and_the_stream(self) -> None:
        first, last = heard(DIALECT.reader(parsed()), CREATED, final(said("a")))
        one = frozenset({0})
        assert first == Heard(choices=one)
        assert (last.choices, last.ends, last.is_last) == (one, one, True)

    def test_a_comment_says_nothing(self) -> None:
        (comment,) = sse.EventParser().feed(DIALECT.keep_alive)
        assert DIALECT.reader(parsed()).hear(comment) == Heard()

    @pytest.mark.parametrize(
        "events",
        [
            [Event(None, "{", b"")],
            [Event(None, "[]", b"")],
            [Event(None, "{}", b"")],
            [Event(None, '{"type":3}', b"")],
            [Event(None, "[DONE]", b"")],
            [Event(None, '{"type":"x","a":1,"a":2}', b"")],
            [Event(None, '{"type":"error","message":"x"}', b"")],
            [Event("error", '{"type":"x"}', b"")],
            [Event(None, '{"type":"response.completed"}', b"")],
            [event_of({"type": "response.completed", "response": {"status": "completed"}})],
            [event_of(final(kind="completed") | {"response": response(status="running")})],
            [event_of(final()), event_of(final())],
            [event_of(final()), event_of(delta("a"))],
            [event_of(final()), Event(None, "[DONE]", b""), Event(None, "[DONE]", b"")],
        ],
    )
    def test_a_stream_that_cannot_be_read_is_refused(self, events: list[Event]) -> None:
        reader = DIALECT.reader(parsed())
        for event in events[:-1]:
            reader.hear(event)
        with pytest.raises(UpstreamMalformed):
            reader.hear(events[-1])

    def test_a_stream_without_an_end_is_no_answer(self) -> None:
        reader = DIALECT.reader(parsed())
        heard(reader, CREATED, delta("a"))
        with pytest.raises(UpstreamMalformed):
            reader.answer()


def containers(value: Any) -> Any:
    """All objects in a JSON value."""
    if isinstance(value, dict):
        yield value
        value = [*value.values()]
    if isinstance(value, list):
        for inner in value:
            yield from containers(inner)


def cut_after(
    events: Sequence[Mapping[str, Any]], count: int, exchange: Exchange | None = None
) -> bytes:
    """What a client gets of a stream of which all was heard and only so much was sent."""
    reader = DIALECT.reader(exchange or parsed())
    made = [event_of(event) for event in events]
    for event in made:
        reader.hear(event)
    for event in made[:count]:
        reader.sent(event)
    shown = b"".join(event.raw for event in made[:count])
    ended = shown + reader.cut(0) + reader.end()
    assert reader.cut(0) == reader.end() == b""
    return ended


class TestCutting:
    @given(OUTPUTS, st.randoms())
    def test_a_cut_stream_is_complete_and_holds_what_was_sent(
        self, items: Any, chance: random.Random
    ) -> None:
        events = chopped(events_of(response(*items)), chance)
        count = chance.randrange(1, len(events))
        raw = cut_after(events, count)
        ended = values_of(raw)
        assert ended[:count] == events[:count]
        assert [event["sequence_number"] for event in ended] == list(range(len(ended)))
        kinds = [event["type"] for event in ended]
        assert kinds[-1] == "response.incomplete"
        terminal = ("response.completed", "response.incomplete", "response.failed")
        assert sum(kind in terminal for kind in kinds) == 1
        for stem in ("output_item", "content_part", "reasoning_summary_part"):
            assert kinds.count(f"response.{stem}.added") == kinds.count(f"response.{stem}.done")

        # The dialect's own parsers read it: nothing stands in its events that its end has not.
        answer = DIALECT.parse_stream(parsed(), [json.dumps(event) for event in ended])
        assert answer == DIALECT.parse_answer(parsed(), ended[-1]["response"])
        reader = DIALECT.reader(parsed())
        new = [one for each in heard(reader, *ended)[count:] for one in each.said]
        assert new == []

        final_response = ended[-1]["response"]
        assert final_response["incomplete_details"] == {"reason": "content_filter"}
        assert final_response["usage"] == response()["usage"]
        for key in ("id", "model", "created_at", "tools"):
            assert final_response[key] == response()[key]
        done = {e["output_index"]: e["item"] for e in ended if e["type"].endswith("item.done")}
        assert final_response["output"] == [done[number] for number in sorted(done)]
        open_at_cut = len(done) - sum(e["type"].endswith("item.done") for e in events[:count])
        texts = [
            part["text"]
            for item in final_response["output"]
            for part in item.get("content", ())
            if part["type"] == "output_text"
        ]
        assert "".join(texts) == shown_text(events[:count])
        assert open_at_cut in (0, 1)

    def test_every_event_is_one_of_the_formats(self) -> None:
        # The client's types want more of a search than ``OTHER`` has.
        events = events_of(response(*ITEMS[:-1], MIXED))
        for count in range(1, len(events)):
            for event in values_of(cut_after(events, count))[count:]:
                read = TypeAdapter[Any](ResponseStreamEvent).validate_python(event)
                assert read.type == event["type"]

    @pytest.mark.parametrize("size", [0, 1, 3, 6])
    def test_a_client_reads_what_was_sent(self, size: int) -> None:
        sent = "a text that goes on"[:size]
        opening = events_of(response(said("a text that goes on")))[:4]
        place = {"item_id": "msg_1", "output_index": 0, "content_index": 0, "logprobs": []}
        deltas = [delta(letter, **place) for letter in sent]
        events = [*opening, *deltas, delta("secret", **place), final(said(f"{sent}secret"))]
        numbered = [{**event, "sequence_number": n} for n, event in enumerate(events)]
        raw = cut_after(numbered, 4 + size)
        assert b"secret" not in raw
        with client(raw).responses.stream(model="m", input="q") as stream:
            read = list(stream)
        end = read[-1]
        assert end.type == "response.incomplete"
        assert end.response.status == "incomplete"
        assert end.response.incomplete_details is not None
        assert end.response.incomplete_details.reason == "content_filter"
        assert end.response.output_text == sent
        assert "".join(e.delta for e in read if e.type == "response.output_text.delta") == sent
        (done,) = [e for e in read if e.type == "response.output_text.done"]
        assert done.text == sent
        plain = list(client(raw).responses.create(model="m", input="q", stream=True))
        assert plain[-1].type == "response.incomplete"

    @settings(max_examples=5)
    @given(st.randoms())
    def test_a_client_that_parses_survives_half_of_an_answer(self, chance: random.Random) -> None:
        shape = {"type": "json_schema", "name": "Sky", "schema": Sky.model_json_schema()}
        exchange = parsed(text={"format": shape})
        events = chopped(events_of(response(said('{"color":"blue"}'))), chance)
        whole = [event["type"] for event in events].index("response.output_text.done")
        for count in range(1, len(events)):
            raw = cut_after(events, count, exchange)
            with client(raw).responses.stream(model="m", input="q", text_format=Sky) as stream:
                kinds = [event.type for event in stream]
            assert kinds[-1] == "response.incomplete"
            assert ("response.output_text.done" in kinds) == (count >= whole)

    def test_nobody_is_told_that_half_a_call_is_done(self) -> None:
        item = call('{"to":"you"}') | {"id": "fc_1", "status": "completed"}
        events = events_of(response(item))
        at = [event["type"] for event in events].index("response.function_call_arguments.delta")
        events[at]["delta"] = '{"to'
        done, end = values_of(cut_after(events, at + 1))[at + 1 :]
        assert done["item"] == {**item, "arguments": '{"to', "status": "incomplete"}
        assert end["response"]["output"] == [done["item"]]

    def test_what_was_dropped_leaves_no_trace(self) -> None:
        events = events_of(response(said("a"), said(BAD, "msg_2")))
        events[-1]["response"] |= {"x_new": BAD, "error": {"message": BAD}}
        second = [e["type"] for e in events].index("response.output_item.done") + 1
        assert BAD not in cut_after(events, second).decode()

    def test_a_stream_that_has_ended_is_not_ended_again(self) -> None:
        reader = DIALECT.reader(parsed())
        for value in events_of(response(said("a"))):
            reader.hear(event := event_of(value))
            reader.sent(event)
        assert reader.cut(0) == reader.end() == b""

    def test_an_event_is_sent_after_it_was_heard(self) -> None:
        with pytest.raises(AssertionError):
            DIALECT.reader(parsed()).sent(event_of(CREATED))

    def test_an_event_is_of_the_one_choice_or_of_none(self) -> None:
        reader = DIALECT.reader(parsed())
        event = event_of(CREATED)
        (comment,) = sse.EventParser().feed(sse.comment("a"))
        assert reader.without(event, frozenset()) == event.raw
        assert reader.without(event, frozenset({0})) == b""
        assert reader.without(comment, frozenset({0})) == comment.raw

    def test_no_choice_comes_from_elsewhere(self) -> None:
        with pytest.raises(AssertionError):
            DIALECT.reader(parsed()).spoken(Choice(0, (), {}))


class Sky(BaseModel):
    color: str


def test_a_client_passes_over_what_keeps_a_stream_open() -> None:
    raw = b"".join(
        DIALECT.keep_alive + event_of(event).raw for event in events_of(response(said("a")))
    )
    with client(raw).responses.stream(model="m", input="q") as stream:
        assert stream.get_final_response().output_text == "a"
    assert isinstance(client(raw), openai.OpenAI)
