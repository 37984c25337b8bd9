"""The dialect of raw completions: what is scanned, what each choice answers, how it is rendered."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.verdict import nothing
from service import extractor, openai_format, sse
from service.completions import CompletionsDialect
from service.errors import BadRequest, TooLarge, UpstreamMalformed
from service.exchange import Annotations, Answer, Exchange, Refusal, Retry

DIALECT = CompletionsDialect()
REFUSAL = Refusal("No.", "stop")
TEXTS = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1)
JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
IDS = st.lists(st.integers(0, 2**31), min_size=1, max_size=4)
PROMPTS: st.SearchStrategy[Any] = (
    TEXTS | st.lists(TEXTS, min_size=1, max_size=3) | IDS | st.lists(IDS, min_size=1, max_size=3)
)
KEYS = ("suffix", "user", "stop", "best_of", "echo", "bad_words", "response_format", "logit_bias",
        "structured_outputs", "stream_options", "vllm_xargs", "prompt_embeds", "guided_regex",
        "some_token_ids", "messages", "a new key")  # fmt: skip
NEW_KEYS = ("new", "seen", "a new key")


def parsed(prompt: Any, **more: Any) -> Exchange:
    return DIALECT.parse({"model": "m", "prompt": prompt, **more})


def scanned(exchange: Exchange) -> list[tuple[str, str, str]]:
    return [(field.name, field.path, field.judged.text) for field in exchange.fields]


def choice(index: int, text: str, **more: Any) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": "stop", **more}


def answered(exchange: Exchange, *texts: str, **more: Any) -> Answer:
    choices = [choice(index, text) for index, text in enumerate(texts)]
    return DIALECT.parse_answer(exchange, {"choices": choices, **more})


def judged(answer: Answer) -> list[list[tuple[str, list[str]]]]:
    """Of each choice, each text that is judged and the turns before it."""
    return [
        [(field.judged.text, [turn.text for turn in field.judged.context]) for field in one.fields]
        for one in answer.choices
    ]


def data_of(stream: bytes) -> list[str]:
    parser = sse.EventParser()
    return [event.data for event in (*parser.feed(stream), *parser.finish()) if event.data]


def streamed(chunks: list[dict[str, Any]]) -> list[str]:
    return [*(json.dumps(chunk) for chunk in chunks), "[DONE]"]


def leaves(value: Any) -> Iterator[str]:
    """Each string in a JSON value, keys of objects included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from leaves(item)


class TestPrompts:
    @pytest.mark.parametrize(
        ("prompt", "fields", "tokens"),
        [
            ("a", [("prompt", "a")], []),
            (["a"], [("prompt[0]", "a")], []),
            (["a", "b"], [("prompt[0]", "a"), ("prompt[1]", "b")], []),
            ([1, 2], [], [("prompt", (1, 2))]),
            ([[1, 2], [3]], [], [("prompt[0]", (1, 2)), ("prompt[1]", (3,))]),
            (["a", " "], [("prompt[0]", "a")], []),
            ("", [], []),
        ],
    )
    def test_each_prompt_is_a_message_or_waits_for_its_text(
        self, prompt: Any, fields: list[tuple[str, str]], tokens: list[Any]
    ) -> None:
        exchange = parsed(prompt)
        assert scanned(exchange) == [("message", *field) for field in fields]
        assert all(field.judged.role == "prompt" for field in exchange.fields)
        assert [(prompt.path, prompt.ids) for prompt in exchange.token_prompts] == tokens
        assert exchange.unscannable == ()

    @pytest.mark.parametrize(
        ("prompt", "n", "choices"),
        [("a", None, 1), ("a", 3, 3), (["a", "b"], 2, 4), ([1, 2], 2, 2), ([[1], [2]], 1, 2)],
    )
    def test_there_are_n_choices_for_each_prompt(
        self, prompt: Any, n: int | None, choices: int
    ) -> None:
        assert parsed(prompt, n=n).choices == choices

    @pytest.mark.parametrize(
        ("prompt", "param"),
        [
            (None, "prompt"),
            ([], "prompt"),
            (3, "prompt"),
            ({"a": "b"}, "prompt"),
            (["a", 1], "prompt[1]"),
            ([1, "a"], "prompt[1]"),
            ([1, True], "prompt[1]"),
            ([True], "prompt[0]"),
            ([1.5], "prompt[0]"),
            ([None], "prompt[0]"),
            ([{"prompt": "a"}], "prompt[0]"),
            ([1, -1], "prompt[1]"),
            ([[1], "a"], "prompt[1]"),
            ([[1], []], "prompt[1]"),
            ([[1], [2, "a"]], "prompt[1][1]"),
            ([[1], [[2]]], "prompt[1][0]"),
        ],
    )
    def test_what_is_no_prompt_is_refused_by_its_place(self, prompt: Any, param: str) -> None:
        with pytest.raises(BadRequest) as caught:
            parsed(prompt)
        assert caught.value.param == param
        assert not jsonschema.Draft202012Validator(DIALECT.schema).is_valid(
            {"model": "m", "prompt": prompt}
        )

    @settings(max_examples=50, deadline=None)
    @given(PROMPTS)
    def test_what_is_a_prompt_is_valid_under_the_schema(self, prompt: Any) -> None:
        parsed(prompt)
        jsonschema.validate({"model": "m", "prompt": prompt}, DIALECT.schema)

    def test_choices_are_bounded(self) -> None:
        with pytest.raises(TooLarge):
            parsed([" "] * 4000, n=100)

    @pytest.mark.parametrize(
        ("more", "field"),
        [
            ({"suffix": "the end"}, ("message", "suffix", "the end")),
            ({"suffix": ["an end"]}, ("other", "", "an end")),
            ({"stop": ["a whole sentence"]}, ("other", "", "a whole sentence")),
            ({"guided_regex": "[a-z]+"}, ("other", "", "[a-z]+")),
            ({"structured_outputs": {"choice": ["x y"]}}, ("other", "", "choice\nx y")),
            ({"echo": "please do"}, ("other", "", "please do")),
        ],
    )
    def test_whatever_stands_beside_the_prompt_is_scanned(
        self, more: dict[str, Any], field: tuple[str, str, str]
    ) -> None:
        assert field in scanned(parsed("a", **more))

    @pytest.mark.parametrize("more", [{"user": "u1"}, {"stop": ["END"]}, {"best_of": 3}])
    def test_words_that_no_model_reads_are_not(self, more: dict[str, Any]) -> None:
        assert len(parsed("a", **more).fields) == 1

    @pytest.mark.parametrize(
        ("body", "choices"),
        [
            ({"prompt_embeds": "AAAA"}, 1),
            ({"prompt_embeds": ["AAAA", "BBBB"]}, 2),
            ({"prompt_embeds": ["AAAA", "BBBB"], "prompt": "a", "n": 2}, 6),
        ],
    )
    def test_embeddings_in_place_of_a_prompt_cannot_be_scanned(
        self, body: dict[str, Any], choices: int
    ) -> None:
        exchange = DIALECT.parse({"model": "m", **body})
        assert (exchange.unscannable, exchange.choices) == (("prompt_embeds",), choices)

    @settings(max_examples=100, deadline=None)
    @given(PROMPTS, st.dictionaries(st.sampled_from(KEYS) | TEXTS, JSON, max_size=6))
    def test_no_string_that_is_forwarded_escapes(
        self, prompt: Any, more: Mapping[str, Any]
    ) -> None:
        reserved = ("model", "prompt", "n", "stream", "moderation")
        more = {key: value for key, value in more.items() if key not in reserved}
        exchange = parsed(prompt, **more)
        texts = "\n".join(text for _, _, text in scanned(exchange))
        forwarded = DIALECT.forwarded(exchange) or exchange.body
        for key, value in forwarded.items():
            if key == "model" or key in exchange.unscannable:
                continue
            if key in openai_format.WORDS and extractor.are_words(value):
                continue
            assert extractor.are_words(key) or key in texts
            assert all(string in texts for string in leaves(value) if string.strip())
        ids = [prompt.ids for prompt in exchange.token_prompts]
        if not isinstance(prompt, str) and not isinstance(prompt[0], str):
            lists = prompt if isinstance(prompt[0], list) else [prompt]
            assert ids == [tuple(one) for one in lists]


class TestAnswers:
    @pytest.mark.parametrize(
        ("prompt", "n", "contexts"),
        [
            ("a", 2, [["a"], ["a"]]),
            (["a", "b"], 1, [["a"], ["b"]]),
            (["a", "b"], 2, [["a"], ["a"], ["b"], ["b"]]),
            (["", "b"], 1, [[], ["b"]]),
        ],
    )
    def test_each_choice_is_judged_as_an_answer_to_its_prompt(
        self, prompt: Any, n: int, contexts: list[list[str]]
    ) -> None:
        answer = answered(parsed(prompt, n=n), *["said"] * len(contexts))
        assert judged(answer) == [[("said", context)] for context in contexts]
        fields = [field for one in answer.choices for field in one.fields]
        assert {field.judged.role for field in fields} == {"response"}

    def test_the_context_of_token_ids_is_the_text_that_the_upstream_gave(self) -> None:
        exchange = replace(parsed([[1], [2]]), texts={"prompt[0]": "one"})
        assert judged(answered(exchange, "x", "y")) == [[("x", ["one"])], [("y", [])]]
        exchange = replace(parsed([1, 2]), texts={"prompt": "one two"})
        assert judged(answered(exchange, "x")) == [[("x", ["one two"])]]

    def test_choices_of_embeddings_have_no_context_and_come_first(self) -> None:
        exchange = DIALECT.parse({"model": "m", "prompt_embeds": ["AAAA"], "prompt": "a"})
        assert judged(answered(exchange, "x", "y")) == [[("x", [])], [("y", ["a"])]]

    def test_the_choices_are_sorted_by_their_numbers(self) -> None:
        body = {"choices": [choice(1, "y"), choice(0, "x")]}
        answer = DIALECT.parse_answer(parsed(["a", "b"]), body)
        assert judged(answer) == [[("x", ["a"])], [("y", ["b"])]]

    @pytest.mark.parametrize(
        ("echo", "text", "said"),
        [
            (True, "a, and more", ", and more"),
            (True, "more of a", "more of a"),
            (True, "a", None),
            (False, "a, and more", "a, and more"),
            (None, "a, and more", "a, and more"),
        ],
    )
    def test_an_echoed_prompt_is_not_judged_as_an_answer(
        self, echo: bool | None, text: str, said: str | None
    ) -> None:
        answer = answered(parsed("a", echo=echo), text)
        assert judged(answer) == [[(said, ["a"])] if said else []]
        assert answer.choices[0].body["text"] == text

    @pytest.mark.parametrize(
        ("tokens", "beside"),
        [
            (["he", "llo"], None),
            (["<s>", "he", "llo"], "<s>"),
            (["he", "llo", " there", " END"], " there END"),
            (["token_id:7", "token_id:8"], None),
            (["good", "bye"], "goodbye"),
            (None, None),
            ("hello", None),
        ],
    )
    def test_tokens_that_say_more_than_the_text_are_judged(
        self, tokens: Any, beside: str | None
    ) -> None:
        logprobs = {"tokens": tokens, "token_logprobs": [-1.0], "text_offset": [0]}
        body = {"choices": [choice(0, "hello", logprobs=logprobs)]}
        answer = DIALECT.parse_answer(parsed("a"), body)
        fields = [(field.name, field.judged.text) for field in answer.choices[0].fields]
        assert fields == [("text", "hello"), *([("other", beside)] if beside else [])]

    def test_what_repeats_the_prompt_is_passed_over(self) -> None:
        logprobs = [None, {"5": {"logprob": -1.0, "rank": 1, "decoded_token": " a word"}}]
        more = {"prompt_logprobs": logprobs, "prompt_token_ids": [1, 5], "token_ids": [3]}
        body = {"choices": [choice(0, "hello", **more)]}
        answer = DIALECT.parse_answer(parsed("a"), body)
        assert (judged(answer), answer.unscannable) == ([[("hello", ["a"])]], ())

    @settings(max_examples=100, deadline=None)
    @given(
        st.dictionaries(st.sampled_from(NEW_KEYS) | TEXTS, JSON, max_size=4),
        st.dictionaries(st.sampled_from(NEW_KEYS) | TEXTS, JSON, max_size=4),
        TEXTS,
    )
    def test_no_string_that_is_released_escapes(
        self, around: dict[str, Any], beside: dict[str, Any], text: str
    ) -> None:
        known = choice(1, text)
        body = around | {"choices": [choice(0, "x"), beside | known]}
        answer = DIALECT.parse_answer(parsed(["a", "b"]), body)
        fields = [field for one in answer.choices for field in one.fields]
        texts = "\n".join(field.judged.text for field in fields)
        strings = [text, *leaves(list(around.values()))]
        strings += leaves([value for key, value in beside.items() if key not in known])
        assert all(string in texts for string in strings if string.strip())

    @pytest.mark.parametrize(
        "body",
        [
            {},
            {"choices": None},
            {"choices": ["x"]},
            {"choices": [{"index": 0}]},
            {"choices": [{"index": 0, "text": None}]},
            {"choices": [choice(0, "x") | {"index": "0"}]},
            {"choices": [choice(2, "x")]},
            {"choices": [choice(-1, "x")]},
            {"choices": [choice(0, "x"), choice(0, "y")]},
        ],
    )
    def test_an_answer_that_cannot_be_read_cannot_be_judged(self, body: dict[str, Any]) -> None:
        with pytest.raises(UpstreamMalformed):
            DIALECT.parse_answer(parsed("a", n=2), body)

    def test_tokens_are_counted_as_the_upstream_does(self) -> None:
        usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
        answer = answered(parsed("a"), "x", usage=usage)
        assert (answer.prompt_tokens, answer.completion_tokens) == (3, 2)


@st.composite
def cut(draw: st.DrawFn) -> tuple[list[str], list[dict[str, Any]]]:
    """Texts of choices, and chunks that bring them in pieces, one choice among the others."""
    texts = draw(st.lists(TEXTS, min_size=1, max_size=3))
    waiting = []
    for index, text in enumerate(texts):
        cuts = sorted(draw(st.sets(st.integers(0, len(text)), max_size=4)) | {0, len(text)})
        pieces = [text[a:b] for a, b in pairwise(cuts)]
        waiting.append([(index, piece) for piece in pieces])
    chunks: list[dict[str, Any]] = []
    while any(waiting):
        index, piece = draw(st.sampled_from([pieces for pieces in waiting if pieces])).pop(0)
        logprobs = {"tokens": [piece], "token_logprobs": [-1.0], "text_offset": [0]}
        item = {"index": index, "text": piece, "logprobs": logprobs, "token_ids": [7]}
        item["finish_reason"] = None if waiting[index] else "length"
        chunks.append({"id": "x", "object": "text_completion", "choices": [item]})
    return texts, chunks


class TestStreams:
    @settings(max_examples=100, deadline=None)
    @given(cut())
    def test_a_stream_adds_up_to_the_answer_however_it_is_cut(
        self, made: tuple[list[str], list[dict[str, Any]]]
    ) -> None:
        texts, chunks = made
        usage = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
        last = {"id": "x", "choices": [], "usage": usage}
        exchange = parsed("a", n=len(texts), stream=True)
        answer = DIALECT.parse_stream(exchange, streamed([*chunks, last]))
        assert judged(answer) == judged(answered(exchange, *texts))
        assert [one.body["text"] for one in answer.choices] == texts
        assert {one.body["finish_reason"] for one in answer.choices} == {"length"}
        assert sum(len(one.body["token_ids"]) for one in answer.choices) == len(chunks)
        assert (answer.completion_tokens, answer.body["object"]) == (2, "text_completion")

    @settings(max_examples=100, deadline=None)
    @given(st.lists(st.tuples(JSON, JSON), min_size=1, max_size=4))
    def test_no_string_of_any_chunk_escapes(self, values: list[tuple[Any, Any]]) -> None:
        chunks = [
            {"id": "x", "new": around, "choices": [{"index": 0, "text": "t", "new": beside}]}
            for around, beside in values
        ]
        answer = DIALECT.parse_stream(parsed("a"), streamed(chunks))
        texts = "\n".join(field.judged.text for field in answer.choices[0].fields)
        strings = leaves([list(pair) for pair in values])
        assert all(string in texts for string in strings if string.strip())

    @pytest.mark.parametrize(
        "events",
        [
            [],
            ["[DONE]"],
            ["{", "[DONE]"],
            ["[]", "[DONE]"],
            ['{"error":{"message":"x"}}', "[DONE]"],
            ['{"choices":[]}', "[DONE]"],
            ['{"choices":["x"]}', "[DONE]"],
            ['{"choices":[{"text":"x"}]}', "[DONE]"],
            ['{"choices":[{"index":0,"text":3}]}', "[DONE]"],
            ['{"choices":[{"index":0,"text":"x"}]}'],
        ],
    )
    def test_a_stream_that_cannot_be_read_cannot_be_judged(self, events: list[str]) -> None:
        with pytest.raises((UpstreamMalformed, BadRequest)):
            DIALECT.parse_stream(parsed("a"), events)

    @settings(max_examples=50, deadline=None)
    @given(st.lists(TEXTS, min_size=1, max_size=3))
    def test_a_rendered_stream_adds_up_to_the_answer(self, texts: list[str]) -> None:
        options = {"include_usage": True}
        exchange = parsed("a", n=len(texts), stream=True, stream_options=options)
        usage = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
        choices = [choice(index, text) for index, text in enumerate(texts)]
        body = {"id": "x", "object": "text_completion", "created": 1, "model": "m"}
        stream = DIALECT.streamed(exchange, body | {"choices": choices, "usage": usage})
        assert stream.count(b"data: [DONE]\n\n") == 1
        answer = DIALECT.parse_stream(exchange, data_of(stream))
        assert [one.body for one in answer.choices] == choices
        assert answer.completion_tokens == 2


class TestRendering:
    def test_a_refusal_reads_as_a_completion(self) -> None:
        exchange = parsed(["a", "b"], n=2)
        answer = DIALECT.refused(exchange, "id1", 7, REFUSAL)
        assert [one.body for one in answer.choices] == [choice(i, "No.") for i in range(4)]
        assert (answer.body["id"], answer.body["object"]) == ("cmpl-id1", "text_completion")
        assert DIALECT.assembled(answer, answer.choices) == answer.body

    def test_only_our_own_key_is_taken_out(self) -> None:
        assert DIALECT.forwarded(parsed("a", top_k=3)) is None
        changed = DIALECT.forwarded(parsed("a", top_k=3, moderation={"model": "x"}))
        assert changed == {"model": "m", "prompt": "a", "top_k": 3}

    @pytest.mark.parametrize(
        ("prompt", "n", "choices", "again"),
        [
            ("a", 1, (0,), ["a"]),
            ("a", 3, (0, 2), ["a"]),
            (["a", "b", "c"], 1, (0, 2), ["a", "c"]),
            (["a", "b"], 2, (1, 2, 3), ["a", "b", "b"]),
            ([1, 2], 2, (1,), [[1, 2]]),
            ([[1], [2, 3]], None, (1,), [[2, 3]]),
        ],
    )
    def test_a_retry_asks_for_the_prompts_of_the_flagged_choices(
        self, prompt: Any, n: int | None, choices: tuple[int, ...], again: list[Any]
    ) -> None:
        exchange = parsed(prompt, n=n, temperature=1, use_beam_search=True, moderation={})
        body = DIALECT.retried(exchange, Retry(seed=5, instruction="Be kind.", choices=choices))
        assert json.loads(json.dumps(body)) == {
            "model": "m", "prompt": again, "n": len(choices) // len(again), "temperature": 1,
            "seed": 5,
        }  # fmt: skip
        assert exchange.body["prompt"] == prompt

    @pytest.mark.parametrize(
        ("choices", "embeds", "prompt"),
        [((0, 2), ["AAAA"], ["a"]), ((1,), ["BBBB"], None), ((2,), [], ["a"])],
    )
    def test_a_retry_of_embeddings_keeps_them_apart(
        self, choices: tuple[int, ...], embeds: list[str], prompt: list[str] | None
    ) -> None:
        body = {"model": "m", "prompt_embeds": ["AAAA", "BBBB"], "prompt": "a"}
        again = DIALECT.retried(DIALECT.parse(body), Retry(5, "I", choices))
        assert (again["prompt_embeds"], again["prompt"]) == (embeds, prompt)

    def test_an_answer_to_a_retry_is_judged_in_the_context_of_its_own_prompt(self) -> None:
        exchange = replace(parsed(["a", "b"], n=1, echo=True), asked_again=(1,))
        answer = answered(exchange, "b again", new="around it")
        moved = DIALECT.renumbered(answer.choices[0], 1)
        assert (moved.index, moved.body["index"]) == (1, 1)
        assert [(f.judged.text, [t.text for t in f.judged.context]) for f in moved.fields] == [
            (" again", ["b"]),
            ("around it", []),
        ]

    def test_verdicts_are_told_beside_the_answer(self) -> None:
        asked = Annotations(
            "g", nothing("prompt"), {0: nothing("response")}, frozenset(), openai=True, azure=True
        )
        shown = DIALECT.annotated({"choices": [choice(0, "x")]}, asked)
        assert shown["moderation"]["output"]["results"][0]["flagged"] is False
        assert [one["prompt_index"] for one in shown["prompt_filter_results"]] == [0]
        assert shown["choices"][0]["content_filter_results"]["hate"]["severity"] == "safe"

    def test_verdicts_on_a_stream_come_before_its_end(self) -> None:
        asked = Annotations(
            "g", nothing("prompt"), {0: nothing("response")}, frozenset(), openai=True, azure=True
        )
        raw = sse.encode(json.dumps({"id": "x", "choices": [choice(0, "hello")]})) + sse.DONE
        *events, end = data_of(DIALECT.annotated_stream(raw, asked))
        passed, azure, openai = (json.loads(event) for event in events)
        assert (passed["choices"][0]["text"], end) == ("hello", "[DONE]")
        assert azure["choices"][0]["text"] == ""
        assert azure["choices"][0]["content_filter_results"]["hate"]["filtered"] is False
        assert azure["object"] == openai["object"] == "text_completion"
        assert "moderation" in openai
