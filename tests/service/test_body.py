"""Bodies: what is read of them, and what is refused because two parsers may read it differently."""

import asyncio
import json
from collections import deque
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.body import ClientDisconnected, Message, dumps, parse_object, read_body, strings
from service.errors import BadRequest, TooLarge
from tests.guards import CANARY

TEXTS = st.text(list('ab"\\/{}[]:, \n\x01\x7fé😀\ufeff\u2028\uffff'), max_size=8)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXTS,
    lambda children: st.lists(children, max_size=4) | st.dictionaries(TEXTS, children, max_size=4),
    max_leaves=12,
)


class TestParsing:
    @settings(max_examples=50, deadline=None)
    @given(st.dictionaries(TEXTS, VALUES, max_size=4), st.booleans())
    def test_every_json_object_is_read_as_it_is(self, value: dict[str, Any], escaped: bool) -> None:
        assert parse_object(json.dumps(value, ensure_ascii=escaped).encode()) == value

    @pytest.mark.parametrize(
        ("raw", "code", "says"),
        [
            (b"", "invalid_json", "expecting value at line 1, column 1"),
            (b'{"a": canary', "invalid_json", "line 1, column 7"),
            (b'{"a":\n "canary', "invalid_json", "line 2, column 2"),
            (b'{"a": "canary"} canary', "invalid_json", "extra data at line 1, column 17"),
            (b'{"a": "canary\\x"}', "invalid_json", "escape"),
            (b'{"a": "canary\n"}', "invalid_json", "invalid control character at line 1"),
            (b'{"canary": 1, "canary": 2}', "duplicate_key", "twice"),
            (b'{"a": {"canary": 1, "canar\\u0079": 2}}', "duplicate_key", "twice"),
            (b'\xef\xbb\xbf{"a": "canary"}', "invalid_json", "byte order mark"),
            (b'{"a": "canary\xff"}', "invalid_utf8", "byte 13"),
            ('{"a": "canary"}'.encode("utf-16"), "invalid_utf8", "byte 0"),
            (b'{"a": "canary\xed\xa0\x80"}', "invalid_utf8", "byte 13"),
            (b'{"a": "canary\\ud800"}', "invalid_text", "surrogate"),
            (b'{"a": ["canary\\uDC00\\uD800"]}', "invalid_text", "surrogate"),
            (b'{"canary\\ud800": 1}', "invalid_text", "surrogate"),
            (b'{"a": "canary\\u0000"}', "invalid_text", "NUL"),
            (b'{"a": "canary\x00"}', "invalid_json", "control character"),
            (b'{"a": NaN, "b": "canary"}', "invalid_json", "NaN"),
            (b'{"a": [Infinity]}', "invalid_json", "Infinity"),
            (b'{"a": -Infinity}', "invalid_json", "-Infinity"),
            (b'{"a": 1e400}', "invalid_json", "too large"),
            (b'{"a": -1e999999999}', "invalid_json", "too large"),
            (b'{"a": ' + b"9" * 5000 + b"}", "invalid_json", "too long"),
            (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "invalid_json", "too deeply"),
            (b'{"a": ' + b"[" * 100_000, "invalid_json", "too deeply"),
            (b'["canary"]', "invalid_json", "object"),
            (b'"canary"', "invalid_json", "object"),
            (b"null", "invalid_json", "object"),
        ],
    )
    def test_what_is_not_one_readable_object_is_refused_in_a_sentence(
        self, raw: bytes, code: str, says: str
    ) -> None:
        with pytest.raises(BadRequest) as refused:
            parse_object(raw)
        assert refused.value.code == code
        assert says in refused.value.message
        assert "canar" not in refused.value.message

    def test_whole_surrogate_pairs_and_backslashes_before_them_are_text(self) -> None:
        raw = rb'{"a": "\ud83d\ude00", "b": "\\ud800", "c": "\\u0000"}'
        assert parse_object(raw) == {"a": "😀", "b": r"\ud800", "c": r"\u0000"}

    @settings(deadline=None)
    @given(st.binary(max_size=60))
    def test_any_bytes_are_read_or_refused_without_their_content(self, raw: bytes) -> None:
        marked = b'{"' + CANARY.encode() + b'": ' + raw + b"}"
        try:
            parse_object(marked)
        except BadRequest as error:
            assert CANARY not in error.message  # noqa: PT017


class Arriving:
    """ASGI's ``receive``, over a list; it hangs where the list has ended."""

    def __init__(self, *messages: Message) -> None:
        self._messages = deque(messages)
        self.taken = 0

    async def __call__(self) -> Message:
        if not self._messages:
            await asyncio.Event().wait()
        self.taken += 1
        return self._messages.popleft()


def chunk(body: bytes, more: bool = True) -> Message:
    return {"type": "http.request", "body": body, "more_body": more}


class TestReading:
    async def test_chunks_are_joined(self) -> None:
        arriving = Arriving(chunk(b"ab"), {"type": "http.request", "more_body": True})
        arriving._messages.append(chunk(b"c", more=False))
        assert await read_body(arriving, 3) == b"abc"

    async def test_a_message_without_keys_is_an_empty_body(self) -> None:
        assert await read_body(Arriving({"type": "http.request"}), 1) == b""

    async def test_reading_stops_at_the_chunk_that_is_over_the_limit(self) -> None:
        arriving = Arriving(chunk(b"ab"), chunk(b"cd"), chunk(b"ef"))
        with pytest.raises(TooLarge) as refused:
            await read_body(arriving, 3)
        assert refused.value.code == "body_too_large"
        assert "3 bytes" in refused.value.message
        assert arriving.taken == 2

    async def test_a_client_that_leaves_is_told_apart_from_a_short_body(self) -> None:
        with pytest.raises(ClientDisconnected):
            await read_body(Arriving(chunk(b'{"a": 1}'), {"type": "http.disconnect"}), 100)


class TestStrings:
    def test_they_come_in_the_order_in_which_they_stand(self) -> None:
        value = {"a": ["b", {"c": "d"}, 1, None], "e": "f", "g": True}
        assert list(strings(value)) == ["a", "b", "c", "d", "e", "f", "g"]

    @settings(max_examples=50, deadline=None)
    @given(VALUES)
    def test_all_of_them_are_found(self, value: Any) -> None:
        found = deque(strings(value))
        # JSON itself is the other walk: each string stands in it, in the same order.
        rest = dumps(value)
        while found:
            quoted = dumps(found.popleft())
            assert quoted in rest
            rest = rest.split(quoted, 1)[1]
        assert '"' not in rest

    def test_depth_costs_no_recursion(self) -> None:
        value: Any = "deep"
        for _ in range(5_000):
            value = [value]
        assert list(strings(value)) == ["deep"]
        while isinstance(value, list):
            value = value.pop()


def test_json_is_written_compactly_in_utf_8() -> None:
    assert dumps({"a": ["é", 1.5, None]}) == '{"a":["é",1.5,null]}'
