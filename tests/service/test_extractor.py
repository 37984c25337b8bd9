"""What is scanned of a JSON value: every string in it, so that nothing passes by being new."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service import extractor
from service.extractor import Reader, Scan

TEXTS = st.text(list('abc"\\{}é😀'), min_size=1, max_size=6)
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXTS,
    lambda children: st.lists(children, max_size=4) | st.dictionaries(TEXTS, children, max_size=4),
    max_leaves=10,
)


def texts_of(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [text for pair in value.items() for item in pair for text in texts_of(item)]
    if isinstance(value, list):
        return [text for item in value for text in texts_of(item)]
    return []


@settings(max_examples=50, deadline=None)
@given(VALUES)
def test_leaves_are_all_strings_one_a_line(value: Any) -> None:
    assert extractor.leaves(value) == "\n".join(texts_of(value))


def test_leaves_leave_out_what_is_blank() -> None:
    assert extractor.leaves(["a", "", " \n", {"": "b"}]) == "a\nb"


def rest(body: dict[str, Any], *taken: str, words: frozenset[str] = frozenset()) -> Scan:
    """What is found in ``body`` by a reader who knows some of its keys."""
    reader = Reader(body)
    for key in taken:
        reader.take(key)
    reader.pass_words(words)
    scan = Scan()
    reader.rest(scan)
    return scan


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(TEXTS, VALUES, max_size=5), st.data())
def test_every_string_that_nobody_took_is_scanned(
    body: dict[str, Any], data: st.DataObject
) -> None:
    taken = data.draw(st.sets(st.sampled_from(sorted(body)))) if body else set()
    scanned = "\n".join(piece.text for piece in rest(body, *taken).pieces)
    for key, value in body.items():
        if key not in taken:
            assert all(text in scanned for text in texts_of(value) if text.strip())


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({"model": "m", "guided": {"a": "b"}}, "m\na\nb"),
        ({"temperature": 0.5, "stream": True, "new": None}, ""),
        ({"how to build a bomb": 1}, "how to build a bomb"),
        ({"user": "team-7/alice@example.com"}, ""),
        ({"user": "tell me how"}, "tell me how"),
        ({"user": ["a", {"b": "c"}]}, ""),
        ({"user": ["a", {"b": "c d"}]}, "a\nb\nc d"),
        ({"user": "x" * 129}, "x" * 129),
    ],
)
def test_words_pass_where_words_belong_and_sentences_do_not(body: Any, text: str) -> None:
    scan = rest(body, words=frozenset({"user"}))
    assert [piece.text for piece in scan.pieces] == ([text] if text else [])
    assert {piece.name for piece in scan.pieces} <= {"other"}


@pytest.mark.parametrize(
    ("body", "unscannable"),
    [
        ({"prompt_token_ids": [1, 2]}, ["prompt_token_ids"]),
        ({"tokens": [[1], [2]]}, ["tokens"]),
        ({"max_tokens": 5, "return_token_ids": True}, []),
        ({"bounds": [1, 2]}, []),
    ],
)
def test_token_ids_under_an_unknown_key_cannot_be_scanned(
    body: Any, unscannable: list[str]
) -> None:
    assert rest(body).unscannable == unscannable


def test_what_is_read_beside_token_ids_is_scanned_too() -> None:
    scan = rest({"token": [0, "bad words"]})
    assert scan.unscannable == ["token"]
    assert [piece.text for piece in scan.pieces] == ["bad words"]


def test_what_is_refused_is_named_by_its_place() -> None:
    reader, scan = Reader({"audio": {"data": "AAAA"}, "images": None}, "messages[0]"), Scan()
    reader.refuse(scan, ("audio", "images"))
    reader.rest(scan)
    assert (scan.unscannable, scan.pieces) == (["messages[0].audio"], [])


def test_a_definition_is_read_without_the_words_of_every_schema() -> None:
    tool = {
        "type": "function",
        "function": {
            "name": "send",
            "description": "Sends a mail.",
            "parameters": {"type": "object", "properties": {"to": {"type": "string"}}},
        },
    }
    assert extractor.definition(tool) == "send\nSends a mail.\nto"


@pytest.mark.parametrize(
    ("raw", "scanned"),
    [
        (r'{"what": "\u0062omb", "how": ["now"]}', "what\nbomb\nhow\nnow"),
        (r'["\u0062omb"]', "bomb"),
        ("half a {", "half a {"),
        ('"a string"', "a string"),
        ("3", "3"),
        ("[" * 100_000, "[" * 100_000),
        ("", ""),
        (None, ""),
        ({"what": "bomb"}, "what\nbomb"),
    ],
)
def test_arguments_are_scanned_as_what_they_mean_where_they_parse(raw: Any, scanned: str) -> None:
    assert extractor.arguments(raw) == scanned


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(TEXTS, VALUES, max_size=4))
def test_no_string_in_arguments_hides_behind_escapes(value: dict[str, Any]) -> None:
    assert extractor.arguments(json.dumps(value)) == extractor.leaves(value)
