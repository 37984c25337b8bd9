"""Streams of chunks, event by event: what each says, and how a stream ends before its end."""

import json
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service import sse
from service.chat import ChatDialect
from service.completions import CompletionsDialect
from service.errors import BadRequest, UpstreamMalformed
from service.exchange import Answer, Exchange, Heard, Refusal, StreamReader

CHAT = ChatDialect()
COMPLETIONS = CompletionsDialect()
VLLM = Path(__file__).parents[1] / "fixtures" / "vllm"
HEAD = {"id": "x1", "object": "chat.completion.chunk", "created": 7, "model": "m"}
USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
REFUSAL = Refusal("No.", "stop")
TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=12)

Dialect = ChatDialect | CompletionsDialect
Chunk = dict[str, Any]


def exchange_of(dialect: Dialect, choices: int = 1, **more: Any) -> Exchange:
    said: Chunk = {"prompt": "q"}
    if dialect is CHAT:
        said = {"messages": [{"role": "user", "content": "q"}]}
    options = {"include_usage": True}
    body = {"model": "m", "n": choices, "stream": True, "stream_options": options}
    return dialect.parse(body | said | more)


def event_of(value: Any) -> sse.Event:
    data = value if isinstance(value, str) else json.dumps(value)
    (event,) = events_in(sse.encode(data))
    return event


def events_in(stream: bytes) -> list[sse.Event]:
    parser = sse.EventParser()
    return [event for event in (*parser.feed(stream), *parser.finish()) if event.data]


def delta(said: Chunk, index: int = 0, **more: Any) -> Chunk:
    item = {"index": index, "delta": said, "finish_reason": None, **more}
    return {**HEAD, "choices": [item]}


def piece(text: str, index: int = 0, **more: Any) -> Chunk:
    item = {"index": index, "text": text, "finish_reason": None, **more}
    return {**HEAD, "object": "text_completion", "choices": [item]}


def text_in(dialect: Dialect, text: str, index: int = 0, **more: Any) -> Chunk:
    return (
        delta({"content": text}, index, **more) if dialect is CHAT else piece(text, index, **more)
    )


def heard_by(reader: StreamReader, *values: Any) -> list[Heard]:
    return [reader.hear(event_of(value)) for value in values]


def tracks(heard: list[Heard]) -> dict[str, str]:
    """The texts of each track, in a row."""
    texts: dict[str, str] = defaultdict(str)
    for said in (said for one in heard for said in one.said):
        texts[said.track] += said.text
    return dict(texts)


def said_by(dialect: Dialect, *values: Any, **more: Any) -> dict[str, str]:
    return tracks(heard_by(dialect.reader(exchange_of(dialect, **more)), *values))


def shown(dialect: Dialect, exchange: Exchange, stream: bytes) -> Answer:
    return dialect.parse_stream(exchange, [event.data for event in events_in(stream)])


@st.composite
def streams(draw: st.DrawFn) -> tuple[Dialect, int, list[Chunk]]:
    """A dialect, a number of choices, and chunks that bring their texts in pieces, by turns, some
    of them of two choices at once.
    """
    dialect: Dialect = CHAT if draw(st.booleans()) else COMPLETIONS
    count = draw(st.integers(1, 3))
    waiting: list[list[Chunk]] = []
    for index in range(count):
        items: list[Chunk] = []
        kinds = ["content", "reasoning", "refusal", "call"] if dialect is CHAT else ["text"]
        for kind in draw(st.lists(st.sampled_from(kinds), min_size=1, unique=True)):
            for number, part in enumerate(pieces(draw, draw(TEXTS))):
                items.append({"index": index, **said_as(kind, part, is_first=number == 0)})
        items[-1]["finish_reason"] = "stop"
        waiting.append(items)
    chunks = []
    while any(waiting):
        turns = [items for items in waiting if items]
        taken = draw(st.permutations(turns))[: draw(st.integers(1, 2))]
        chunks.append({**HEAD, "choices": [items.pop(0) for items in taken]})
    return dialect, count, chunks


def pieces(draw: Callable[[Any], Any], text: str) -> list[str]:
    cuts = sorted(draw(st.sets(st.integers(0, len(text)), max_size=3)) | {0, len(text)})
    return [text[start:end] for start, end in pairwise(cuts)]


def said_as(kind: str, text: str, is_first: bool) -> Chunk:
    if kind == "text":
        return {"text": text}
    if kind != "call":
        return {"delta": {kind: text}}
    name = {"name": "f"} if is_first else {}
    return {"delta": {"tool_calls": [{"index": 0, "function": {**name, "arguments": text}}]}}


def texts_of(choice: Chunk) -> dict[str, str]:
    """What a whole choice says, by track."""
    path = f"choices[{choice['index']}]"
    if "text" in choice:
        return {f"{path}.text": choice["text"]}
    message = choice["message"]
    texts = {
        f"{path}.message.{key}": message.get(key) for key in ("content", "reasoning", "refusal")
    }
    for number, call in enumerate(message.get("tool_calls", ())):
        function = call["function"]
        texts[f"{path}.message.tool_calls[{number}]"] = (
            f"{function['name']}\n{function['arguments']}"
        )
    return {track: text for track, text in texts.items() if text}


class TestHearing:
    @settings(max_examples=150, deadline=None)
    @given(streams())
    def test_the_tracks_are_the_texts_of_the_whole_answer(
        self, made: tuple[Dialect, int, list[Chunk]]
    ) -> None:
        dialect, count, chunks = made
        exchange = exchange_of(dialect, count)
        reader = dialect.reader(exchange)
        heard = heard_by(reader, *chunks, {**HEAD, "choices": [], "usage": USAGE}, "[DONE]")
        answer = dialect.parse_stream(exchange, [*map(json.dumps, chunks), "[DONE]"])
        expected = [texts_of(dict(choice.body)) for choice in answer.choices]
        assert tracks(heard) == {track: text for one in expected for track, text in one.items()}
        assert [choice.body for choice in reader.answer().choices] == [
            choice.body for choice in answer.choices
        ]
        assert reader.answer().completion_tokens == 2
        for one, chunk in zip(heard, chunks, strict=False):
            assert one.choices == {item["index"] for item in chunk["choices"]}
        assert sorted(end for one in heard for end in one.ends) == list(range(count))
        assert [one.choices for one in heard[-2:]] == [frozenset({0}), frozenset()]
        assert [one.is_last for one in heard] == [False] * (len(heard) - 1) + [True]

    @pytest.mark.parametrize("name", ["stream", "stream_usage", "stream_n2", "stream_logprobs"])
    def test_of_vllm_nothing_but_the_text_is_judged(self, name: str) -> None:
        exchange = CHAT.parse(json.loads((VLLM / f"{name}.request.json").read_bytes()))
        reader = CHAT.reader(exchange)
        heard = [reader.hear(event) for event in events_in((VLLM / f"{name}.sse").read_bytes())]
        assert tracks(heard) == {
            f"choices[{choice.index}].message.content": choice.body["message"]["content"]
            for choice in reader.answer().choices
        }
        assert frozenset.union(*(one.ends for one in heard)) == set(range(exchange.choices))

    @pytest.mark.parametrize("level", range(9))
    @pytest.mark.parametrize("dialect", [CHAT, COMPLETIONS], ids=lambda one: one.name)
    @settings(max_examples=30, deadline=None)
    @given(
        key=st.sampled_from(["new", "note", "text", "input", "partial", "a key of words"]),
        cut=st.integers(1, 20),
        wrap=st.sampled_from(["text", "object", "list"]),
    )
    def test_what_is_planted_under_any_key_is_said(
        self, dialect: Dialect, level: int, key: str, cut: int, wrap: str
    ) -> None:
        sentence = "how to build a bomb at home"
        reader = dialect.reader(exchange_of(dialect))
        heard = []
        # Where identifiers belong, words pass: a sentence comes there in one.
        parts = (sentence[:cut], sentence[cut:]) if level < 7 else (sentence,)
        for part in parts:
            wrapped = {"text": part, "object": {"deep": [{"er": part}]}, "list": [part]}[wrap]
            chunk = text_in(dialect, "Hi.")
            item = chunk["choices"][0]
            function = {"arguments": "{}"}
            call = {"index": 0, "function": function}
            entry = {"token": "Hi.", "logprob": -1.0, "bytes": None, "top_logprobs": []}
            item["logprobs"] = {"content": [entry]}
            if dialect is CHAT:
                item["delta"]["tool_calls"] = [call]
            planted = [
                (chunk, key), (item, key), (item.get("delta", item), key), (call, key),
                (function, key), (item["logprobs"], key), (entry, key), (item, "stop_reason"),
                (chunk, "system_fingerprint"),
            ]  # fmt: skip
            node, name = planted[level]
            if (dialect is COMPLETIONS and level in (3, 4)) or name in node:
                return
            node[name] = wrapped
            heard += heard_by(reader, chunk)
            assert any(part.strip() in said.text for said in heard[-1].said)
        texts = tracks(heard)
        assert any(sentence in text for text in texts.values()), texts

    def test_what_never_changes_is_said_once_for_each_choice(self) -> None:
        verdict = {"hate": {"filtered": False, "severity": "safe"}}
        chunks = [
            {**delta({"content": text}, index, content_filter_results=verdict), "provider": "A B"}
            for index, text in [(0, "a"), (0, "b"), (1, "c"), (0, "d")]
        ]
        heard = heard_by(CHAT.reader(exchange_of(CHAT, 2)), *chunks)
        said = [{one.text for one in event.said if one.name == "other"} for event in heard]
        everything = {"hate", "filtered\nseverity", "safe", "A B"}
        assert said == [everything, set(), everything, set()]

    def test_a_chunk_without_choices_may_come_first(self) -> None:
        results = [{"prompt_index": 0, "content_filter_results": {"hate": {"severity": "safe"}}}]
        first = {"choices": [], "id": "", "model": "", "prompt_filter_results": results}
        reader = CHAT.reader(exchange_of(CHAT))
        heard = heard_by(reader, first, delta({"content": "a"}))
        assert "safe" in {said.text for said in heard[0].said}
        assert heard[0].choices == {0}
        assert heard[1].said[0].text == "a"

    @pytest.mark.parametrize(
        ("logprobs", "beside"),
        [
            ({"content": [{"token": "hello", "logprob": -1, "bytes": [*b"hello"]}]}, {}),
            ({"content": [{"token": "bye", "logprob": -1, "bytes": None}]}, {"tokens": "bye"}),
            ({"content": [{"token": "hello", "bytes": [*b"bye"]}]}, {"bytes": "bye"}),
            ({"content": [{"token": "hello"}, {"token": " END"}]}, {"tokens": " END"}),
            ({"content": [{"token": "token_id:7", "bytes": [*b"token_id:7"]}]}, {}),
            ({"content": [{"token": "\ufffd", "bytes": [0xF0, 0x9F]}]}, {}),
            ({"refusal": [{"token": "bye"}]}, {"tokens": "bye"}),
            ({"tokens": ["hel", "lo"], "top_logprobs": [{"hel": -1}]}, {}),
            ({"tokens": ["hello", " there"]}, {"tokens": " there"}),
            (
                {"tokens": [{"token": {"a": "b c"}}]},
                {"tokens[0].token": "a", "tokens[0].token.a": "b c"},
            ),
            ("a sentence", {"": "a sentence"}),
            (None, {}),
        ],
    )
    @pytest.mark.parametrize("dialect", [CHAT, COMPLETIONS], ids=lambda one: one.name)
    def test_tokens_that_say_more_than_the_text_are_said(
        self, dialect: Dialect, logprobs: Any, beside: dict[str, str]
    ) -> None:
        texts = said_by(dialect, text_in(dialect, "hello", logprobs=logprobs, token_ids=[7]))
        place = "choices[0].logprobs"
        found = {t.removeprefix(place).removeprefix("."): s for t, s in texts.items() if place in t}
        assert found == beside

    def test_a_character_whose_bytes_come_in_two_chunks_is_no_more_than_the_text(self) -> None:
        halves = [[0xF0, 0x9F], [0x98, 0x80]]
        chunks = [
            delta({"content": text}, logprobs={"content": [{"token": "\ufffd", "bytes": half}]})
            for text, half in zip(("", "😀"), halves, strict=True)
        ]
        assert said_by(CHAT, *chunks) == {"choices[0].message.content": "😀"}
        (_, content), (_, more) = said_by(
            CHAT,
            chunks[0],
            delta({"content": "x"}, **{"logprobs": chunks[1]["choices"][0]["logprobs"]}),
        ).items()
        assert (content, more) == ("x", "😀")

    @pytest.mark.parametrize(
        ("said", "expected"),
        [
            ([{"content": [{"type": "text", "text": "a b"}]}], {"content": "a b"}),
            ([{"content": ["a", " b"]}], {"content": "a b"}),
            (
                [{"content": [{"type": "text", "text": "a", "new": "b c"}]}],
                {"content": "a", "content[0].new": "b c"},
            ),
            ([{"function_call": {"name": "f", "arguments": "{"}}], {"function_call": "f\n{"}),
            (
                [{"tool_calls": [{"index": 0, "id": "1", "function": {"name": "f"}}]}] * 2,
                {"tool_calls[0]": "f\n"},
            ),
            (
                [{"tool_calls": [{"index": 0, "custom": {"input": one}}]} for one in ("a ", "b")],
                {"tool_calls[0].custom": "input", "tool_calls[0].custom.input": "a b"},
            ),
            ([{"role": "assistant", "id": "m1"}], {}),
            ([{"name": "a b"}], {"name": "a b"}),
        ],
    )
    def test_what_a_delta_says(self, said: list[Chunk], expected: dict[str, str]) -> None:
        texts = said_by(CHAT, *[delta(one) for one in said])
        path = "choices[0].message."
        assert {track.removeprefix(path): text for track, text in texts.items()} == expected

    def test_what_no_guard_can_read_is_named(self) -> None:
        said: list[Chunk] = [{"audio": {"data": "AA"}}, {"content": [{"type": "image_url"}]}]
        heard = heard_by(CHAT.reader(exchange_of(CHAT)), *[delta(one) for one in said])
        assert [one.unscannable for one in heard] == [
            ("choices[0].message.audio",),
            ("choices[0].message.content[0]",),
        ]

    @settings(max_examples=100, deadline=None)
    @given(st.sampled_from(["q is it", "q", "qu", "no", "how are you, then?"]), st.data())
    def test_an_echoed_prompt_is_not_said_again(self, text: str, data: st.DataObject) -> None:
        prompt = data.draw(st.sampled_from(["q", "q i", "how are you", "quite"]))
        exchange = exchange_of(COMPLETIONS, prompt=prompt, echo=True)
        chunks = [piece(part) for part in pieces(data.draw, text)]
        chunks[-1]["choices"][0]["finish_reason"] = "stop"
        answer = COMPLETIONS.parse_stream(exchange, [*map(json.dumps, chunks), "[DONE]"])
        expected = {field.path: field.judged.text for field in answer.choices[0].fields}
        assert tracks(heard_by(COMPLETIONS.reader(exchange), *chunks)) == expected

    @pytest.mark.parametrize(
        "values",
        [
            ["{"],
            ["[]"],
            ["[DONE]"],
            [{"error": {"message": "x"}}],
            [{"choices": [], "error": {"message": "x"}}],
            [{"choices": None}],
            [{"choices": ["x"]}],
            [{"choices": [{"text": "x", "delta": {}}]}],
            [{"choices": [{"index": 1, "text": "x", "delta": {}}]}],
            [{"choices": [{"index": -1, "text": "x", "delta": {}}]}],
            [{"choices": [{"index": 0, "text": 3, "delta": {"content": 3}}]}],
            [{"choices": [{"index": 0, "text": {}, "delta": "x"}]}],
            ["a", "[DONE]", "[DONE]"],
            ["a", "[DONE]", "b"],
            ["a", "[DONE]", {"choices": []}],
            ["a", {"choices": [{"index": 0, "finish_reason": "stop"}]}, "b"],
            ["a", {"choices": []}, {"error": {"message": "x"}}],
        ],
    )
    @pytest.mark.parametrize("dialect", [CHAT, COMPLETIONS], ids=lambda one: one.name)
    def test_what_cannot_be_judged_is_refused_at_once(
        self, dialect: Dialect, values: list[Any]
    ) -> None:
        reader = dialect.reader(exchange_of(dialect))
        said = [text_in(dialect, one) if one in ("a", "b") else one for one in values]
        heard_by(reader, *said[:-1])
        with pytest.raises((UpstreamMalformed, BadRequest)):
            reader.hear(event_of(said[-1]))

    @pytest.mark.parametrize("kind", ["error", "a whole sentence"])
    def test_an_event_of_another_kind_is_refused(self, kind: str) -> None:
        (event,) = events_in(sse.encode(json.dumps(delta({"content": "a"})), kind))
        with pytest.raises(UpstreamMalformed):
            CHAT.reader(exchange_of(CHAT)).hear(event)

    @pytest.mark.parametrize(
        "said",
        [
            {"role": "a whole sentence"},
            {"tool_calls": [{"index": 2}]},
            {"content": [{"type": "text"}]},
        ],
    )
    def test_a_delta_that_cannot_be_read_is_refused(self, said: Chunk) -> None:
        with pytest.raises(UpstreamMalformed):
            CHAT.reader(exchange_of(CHAT)).hear(event_of(delta(said)))

    def test_a_stream_without_its_end_is_no_answer(self) -> None:
        reader = CHAT.reader(exchange_of(CHAT))
        heard_by(reader, delta({"content": "a"}, finish_reason="stop"))
        with pytest.raises(UpstreamMalformed):
            reader.answer()

    def test_a_comment_says_nothing(self) -> None:
        (comment,) = sse.EventParser().feed(CHAT.keep_alive)
        assert CHAT.reader(exchange_of(CHAT)).hear(comment) == Heard()

    def test_another_attempt_has_the_choices_that_it_is_for(self) -> None:
        reader = CHAT.reader(replace(exchange_of(CHAT, 3), asked_again=(2,)))
        heard_by(reader, delta({"content": "a"}, 0))
        with pytest.raises(UpstreamMalformed):
            reader.hear(event_of(delta({"content": "a"}, 1)))


class TestEnding:
    @settings(max_examples=150, deadline=None)
    @given(streams(), st.data())
    def test_a_stream_can_end_after_any_event(
        self, made: tuple[Dialect, int, list[Chunk]], data: st.DataObject
    ) -> None:
        dialect, count, chunks = made
        exchange = exchange_of(dialect, count)
        reader = dialect.reader(exchange)
        usage = {**HEAD, "choices": [], "usage": USAGE}
        events = [event_of(value) for value in (*chunks, usage, "[DONE]")]
        heard = data.draw(st.integers(1, len(events)))
        sent = data.draw(st.integers(1, heard))
        for event in events[:heard]:
            reader.hear(event)
        for event in events[:sent]:
            reader.sent(event)
        items = [item for chunk in chunks[:sent] for item in chunk["choices"]]
        ended = {item["index"] for item in items if item.get("finish_reason")}
        open_ = sorted({item["index"] for item in items} - ended)
        stream = b"".join(event.raw for event in events[:sent])
        stream += b"".join(reader.cut(choice) for choice in open_) + reader.end() + reader.end()
        assert stream.count(b"[DONE]") == 1
        assert stream.endswith(sse.DONE)
        assert stream.count(b'"usage"') == (heard > len(chunks))
        answer = shown(dialect, exchange, stream)
        assert {one.index: one.body["finish_reason"] for one in answer.choices} == (
            dict.fromkeys(ended, "stop") | dict.fromkeys(open_, "content_filter")
        )
        only = dialect.parse_stream(exchange, [*map(json.dumps, chunks[:sent]), "[DONE]"])
        assert [texts_of(dict(one.body)) for one in answer.choices] == [
            texts_of(dict(one.body)) for one in only.choices
        ]
        assert answer.completion_tokens == (2 if heard > len(chunks) else 0)

    @pytest.mark.parametrize("dialect", [CHAT, COMPLETIONS], ids=lambda one: one.name)
    def test_a_cut_choice_ends_as_one_that_was_filtered(self, dialect: Dialect) -> None:
        reader = dialect.reader(exchange_of(dialect))
        empty = {"id": "", "object": "", "created": 0, "model": "", "choices": []}
        for value in (empty, text_in(dialect, "a"), {**text_in(dialect, "b"), "id": "x2"}):
            reader.hear(event_of(value))
            if value["id"] != "x2":
                reader.sent(event_of(value))
        (event,) = events_in(reader.cut(0))
        said: Chunk = {"delta": {}} if dialect is CHAT else {"text": ""}
        item = {"index": 0, **said, "logprobs": None, "finish_reason": "content_filter"}
        kind = "chat.completion.chunk" if dialect is CHAT else "text_completion"
        assert json.loads(event.data) == {**HEAD, "object": kind, "choices": [item]}

    @pytest.mark.parametrize(
        ("options", "usage", "expected"),
        [
            ({"include_usage": True}, USAGE, USAGE),
            ({"include_usage": True}, None, None),
            ({"include_usage": True}, {**USAGE, "note": "a whole sentence"}, None),
            ({"include_usage": False}, USAGE, None),
            (None, USAGE, None),
        ],
    )
    def test_the_usage_heard_so_far_is_told_where_it_was_asked_for(
        self, options: Any, usage: Any, expected: Any
    ) -> None:
        reader = CHAT.reader(exchange_of(CHAT, stream_options=options))
        event = event_of({**delta({"content": "a"}), "usage": usage})
        reader.hear(event)
        reader.sent(event)
        *before, end = events_in(reader.end())
        assert [json.loads(one.data) for one in before] == (
            [{**HEAD, "choices": [], "usage": expected}] if expected else []
        )
        assert end.data == "[DONE]"

    @settings(max_examples=100, deadline=None)
    @given(streams(), st.data())
    def test_without_some_choices_the_others_stay_as_they_are(
        self, made: tuple[Dialect, int, list[Chunk]], data: st.DataObject
    ) -> None:
        dialect, count, chunks = made
        reader = dialect.reader(exchange_of(dialect, count))
        dropped = data.draw(st.frozensets(st.integers(0, count - 1)))
        for chunk in chunks:
            event = event_of({**chunk, "new": "a sentence"})
            items = chunk["choices"]
            kept = [item for item in items if item["index"] not in dropped]
            around = {} if items[0]["index"] in dropped else {"new": "a sentence"}
            left = reader.without(event, dropped)
            if len(kept) == len(items):
                assert left == event.raw
            elif not kept:
                assert left == b""
            else:
                (only,) = events_in(left)
                assert json.loads(only.data) == {**HEAD, **around, "choices": kept}

    @pytest.mark.parametrize(
        ("more", "left"),
        [
            ({"usage": USAGE}, {"usage": USAGE}),
            ({"usage": USAGE, "new": "a sentence"}, {"usage": USAGE}),
            ({"new": "a sentence"}, None),
        ],
    )
    def test_what_belongs_to_no_choice_goes_with_the_first_where_it_says_anything(
        self, more: Chunk, left: Chunk | None
    ) -> None:
        reader = CHAT.reader(exchange_of(CHAT, 2))
        event = event_of({**HEAD, "choices": [], **more})
        assert reader.without(event, frozenset({1})) == event.raw
        events = [json.loads(one.data) for one in events_in(reader.without(event, frozenset({0})))]
        assert events == ([{**HEAD, "choices": [], **left}] if left else [])
        assert reader.without(event_of("[DONE]"), frozenset({0, 1})) == sse.DONE

    @pytest.mark.parametrize("dialect", [CHAT, COMPLETIONS], ids=lambda one: one.name)
    def test_a_choice_of_another_attempt_is_spoken_in_the_stream_that_has_begun(
        self, dialect: Dialect
    ) -> None:
        exchange = exchange_of(dialect, 2)
        reader = dialect.reader(exchange)
        first = event_of(text_in(dialect, "a", 0, finish_reason="stop"))
        reader.hear(first)
        reader.sent(first)
        spoken = reader.spoken(dialect.refused_choice(exchange, 1, REFUSAL))
        chunks = [json.loads(one.data) for one in events_in(spoken)]
        assert {chunk["id"] for chunk in chunks} == {"x1"}
        assert [chunk["choices"][0]["finish_reason"] for chunk in chunks][-1] == "stop"
        assert len(chunks) == (3 if dialect is CHAT else 1)
        answer = shown(dialect, exchange, first.raw + spoken + reader.end())
        whole = dialect.refused_choice(exchange, 1, REFUSAL).body
        path = f"choices[1].{'message.content' if dialect is CHAT else 'text'}"
        assert texts_of(dict(answer.choices[1].body)) == {path: "No."} == texts_of(dict(whole))
