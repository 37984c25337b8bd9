"""The dialect of embeddings: its input is judged, and its answer holds no text."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.verdict import nothing
from service import extractor, openai_format
from service.body import strings
from service.embeddings import EmbeddingsDialect
from service.errors import BadRequest, UpstreamMalformed
from service.exchange import Annotations, Exchange, Refusal

DIALECT = EmbeddingsDialect()
TEXTS = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1)
JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
IDS = st.lists(st.integers(0, 2**31), min_size=1, max_size=4)
ROLES = st.sampled_from(("system", "user", "assistant", "tool"))
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": ROLES, "content": TEXTS}, optional={"new": JSON, "name": JSON}),
    min_size=1,
    max_size=3,
)
INPUTS = st.one_of(
    st.fixed_dictionaries({"input": TEXTS | st.lists(TEXTS, min_size=1, max_size=3)}),
    st.fixed_dictionaries({"input": IDS | st.lists(IDS, min_size=1, max_size=3)}),
    st.fixed_dictionaries({"messages": MESSAGES | st.lists(MESSAGES, min_size=1, max_size=2)}),
    st.fixed_dictionaries({"input": TEXTS, "messages": MESSAGES}),
)
KEYS = ("user", "tools", "documents", "chat_template_kwargs", "mm_processor_kwargs", "task",
        "instruction", "some_token_ids", "truncation_side", "a new key")  # fmt: skip


def parsed(**body: Any) -> Exchange:
    return DIALECT.parse({"model": "m", **body})


def scanned(exchange: Exchange) -> list[tuple[str, str, str]]:
    return [(field.name, field.path, field.judged.text) for field in exchange.fields]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def said(messages: list[Any]) -> list[Any]:
    """All values in the messages but their roles."""
    return [
        said(one) if isinstance(one, list) else [one[key] for key in one if key != "role"]
        for one in messages
    ]


class TestRequests:
    @pytest.mark.parametrize(
        ("body", "fields"),
        [
            ({"input": "a"}, [("message", "input", "a")]),
            ({"input": ["a", "b"]}, [("message", "input[0]", "a"), ("message", "input[1]", "b")]),
            ({"messages": [user("a")]}, [("message", "messages[0].content", "a")]),
            (
                {"messages": [[user("a")], [user("b")]]},
                [
                    ("message", "messages[0][0].content", "a"),
                    ("message", "messages[1][0].content", "b"),
                ],
            ),
            (
                {"input": "a", "messages": [user("b")]},
                [("message", "input", "a"), ("message", "messages[0].content", "b")],
            ),
            (
                {"input": "a", "encoding_format": "base64", "embed_dtype": "float32"},
                [("message", "input", "a")],
            ),
            (
                {"input": "a", "instruction": "Rank it."},
                [("message", "input", "a"), ("other", "", "Rank it.")],
            ),
        ],
    )
    def test_all_that_is_embedded_is_judged(
        self, body: dict[str, Any], fields: list[tuple[str, str, str]]
    ) -> None:
        exchange = parsed(**body)
        assert scanned(exchange) == fields
        assert (exchange.choices, exchange.stream, exchange.unscannable) == (0, False, ())

    @pytest.mark.parametrize(
        ("given", "tokens"),
        [
            ([1, 2], [("input", (1, 2))]),
            ([[1, 2], [3]], [("input[0]", (1, 2)), ("input[1]", (3,))]),
        ],
    )
    def test_token_ids_wait_for_their_text(self, given: Any, tokens: list[Any]) -> None:
        exchange = parsed(input=given)
        assert [(prompt.path, prompt.ids) for prompt in exchange.token_prompts] == tokens
        assert exchange.fields == ()

    @pytest.mark.parametrize(
        ("body", "path"),
        [
            (
                {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
                "messages[0].content[0]",
            ),
            (
                {"messages": [[user("a")], [{"role": "user", "content": [{"type": "file"}]}]]},
                "messages[1][0].content[0]",
            ),
            ({"messages": [user("a")], "chat_template": "{{x}}"}, "chat_template"),
            (
                {"messages": [user("a")], "chat_template_kwargs": {"chat_template": "{{x}}"}},
                "chat_template_kwargs.chat_template",
            ),
            ({"input": "a", "prompt_token_ids": [1, 2]}, "prompt_token_ids"),
        ],
    )
    def test_what_no_guard_reads_is_named(self, body: dict[str, Any], path: str) -> None:
        assert parsed(**body).unscannable == (path,)

    @pytest.mark.parametrize(
        ("body", "param"),
        [
            ({}, "input"),
            ({"input": None}, "input"),
            ({"input": []}, "input"),
            ({"input": ["a", 1]}, "input[1]"),
            ({"input": [1, "a"]}, "input[1]"),
            ({"input": [[1], ["a"]]}, "input[1][0]"),
            ({"input": [user("a")]}, "input[0]"),
            ({"messages": []}, "messages"),
            ({"messages": "a"}, "messages"),
            ({"messages": [[]]}, "messages"),
            ({"messages": [{"role": "wizard"}]}, "messages[0].role"),
            ({"input": "a", "stream": True}, "stream"),
            ({"input": "a", "stream": "no"}, "stream"),
            ({"input": "a", "encoding_format": "bytes"}, "encoding_format"),
            ({"input": "a", "model": None}, "model"),
        ],
    )
    def test_a_malformed_request_names_the_key(self, body: dict[str, Any], param: str) -> None:
        with pytest.raises(BadRequest) as caught:
            parsed(**body)
        assert caught.value.param == param
        validator = jsonschema.Draft202012Validator(DIALECT.schema)
        assert not validator.is_valid({"model": "m", **body})

    def test_a_stream_may_be_declined(self) -> None:
        assert parsed(input="a", stream=False).stream is False

    @settings(max_examples=60, deadline=None)
    @given(INPUTS, st.dictionaries(st.sampled_from(KEYS) | TEXTS, JSON, max_size=5))
    def test_no_string_that_is_forwarded_escapes(
        self, body: Mapping[str, Any], more: Mapping[str, Any]
    ) -> None:
        reserved = ("model", "n", "stream", "moderation", "encoding_format", *body)
        exchange = parsed(**(dict(body) | {k: v for k, v in more.items() if k not in reserved}))
        jsonschema.validate({"model": "m", **body}, DIALECT.schema)
        texts = "\n".join(text for _, _, text in scanned(exchange))
        for key, value in exchange.body.items():
            if key == "model" or key in exchange.unscannable:
                continue
            if key in openai_format.WORDS and extractor.are_words(value):
                continue
            assert extractor.are_words(key) or key in texts
            for string in strings(said(value) if key == "messages" else value):
                is_schema_word = key == "tools" and extractor.definition(string) == ""
                assert string in texts or not string.strip() or is_schema_word


class TestAnswers:
    BODY: Mapping[str, Any] = {
        "id": "embd-1",
        "object": "list",
        "created": 1,
        "model": "m",
        "data": [{"index": 0, "object": "embedding", "embedding": [0.5, -0.5]}],
        "usage": {"prompt_tokens": 4, "total_tokens": 4, "completion_tokens": 0},
    }

    @pytest.mark.parametrize("vector", [[0.5, -0.5], "AAAAPwAAAL8=" * 100])
    def test_vectors_are_passed_as_they_are(self, vector: Any) -> None:
        data = [{"index": 0, "object": "embedding", "embedding": vector}]
        body = {**self.BODY, "data": data}
        answer = DIALECT.parse_answer(parsed(input="a"), body)
        assert (answer.choices, answer.body, answer.unscannable) == ((), body, ())
        assert (answer.prompt_tokens, answer.completion_tokens) == (4, 0)

    def test_a_text_beside_the_vectors_cannot_be_judged(self) -> None:
        answer = DIALECT.parse_answer(parsed(input="a"), {**self.BODY, "note": "a whole sentence"})
        assert answer.unscannable

    def test_a_stream_was_not_asked_for(self) -> None:
        with pytest.raises(UpstreamMalformed):
            DIALECT.parse_stream(parsed(input="a"), ["{}", "[DONE]"])

    def test_vectors_cannot_refuse(self) -> None:
        assert DIALECT.refused(parsed(input="a"), "id1", 7, Refusal("No.", "stop")) is None  # type: ignore[func-returns-value]

    def test_only_our_own_key_is_taken_out(self) -> None:
        assert DIALECT.forwarded(parsed(input="a", dimensions=3)) is None
        changed = DIALECT.forwarded(parsed(input="a", dimensions=3, moderation={}))
        assert changed == {"model": "m", "input": "a", "dimensions": 3}

    def test_the_verdict_on_the_input_stands_beside_the_vectors(self) -> None:
        safe = nothing("prompt")
        grave = replace(
            safe, at_least=(0.9, 0.9, 0.9), category_scores=(0.9,) * len(safe.category_scores)
        )
        asked = Annotations("g", grave, {}, frozenset(), openai=True, azure=True)
        shown = DIALECT.annotated(self.BODY, asked)
        assert shown["data"] == self.BODY["data"]
        assert shown["moderation"]["input"]["results"][0]["flagged"] is True
        (azure,) = shown["prompt_filter_results"]
        assert azure["content_filter_results"]["hate"] == {"filtered": False, "severity": "high"}
