"""What is scanned of a JSON value: every string in it, so that nothing passes by being new."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service import extractor

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


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(TEXTS, VALUES, max_size=5), st.data())
def test_every_string_under_an_unknown_key_is_scanned(
    body: dict[str, Any], data: st.DataObject
) -> None:
    known = frozenset(data.draw(st.sets(st.sampled_from(sorted(body)))) if body else ())
    scanned = extractor.unknown(body, known)
    for key, value in body.items():
        if key not in known:
            assert all(text in scanned for text in texts_of(value))


def test_what_is_known_is_not_scanned_twice() -> None:
    assert extractor.unknown({"model": "m", "guided": {"a": "b"}}, frozenset({"model"})) == "a\nb"
    assert extractor.unknown({"model": "m", "new": None}, frozenset({"model"})) == ""


@pytest.mark.parametrize(
    ("raw", "scanned"),
    [
        (r'{"what": "\u0062omb", "how": ["now"]}', "what\nbomb\nhow\nnow"),
        (r'["\u0062omb"]', "bomb"),
        ("half a {", "half a {"),
        ('"a string"', '"a string"'),
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
