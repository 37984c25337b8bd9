"""Server-sent events, against the rules of the HTML Standard."""

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.errors import UpstreamMalformed
from service.sse import DONE, Event, EventParser, comment, encode

FIXTURES = Path(__file__).parent.parent / "fixtures" / "vllm"

line_ends = st.sampled_from([b"\n", b"\r", b"\r\n"])
lines = st.sampled_from(
    [
        b"",
        b"",
        b"data",
        b"data:",
        b"data: x",
        b"data:  \xc3\xa9\xe2\x82\xac",
        b"data:[DONE]",
        b": ping",
        b":",
        b"event: ping",
        b"event",
        b"id: 7",
        b"retry: 10",
        b"other: y",
        b"dat: x",
    ]
)
streams = st.tuples(
    st.sampled_from([b"", b"\xef\xbb\xbf"]),
    st.lists(st.tuples(lines, line_ends).map(b"".join)).map(b"".join),
    st.sampled_from([b"", b"data: half", b"\r"]),
).map(b"".join)


def parse(*reads: bytes) -> list[Event]:
    parser = EventParser()
    events = [event for read in reads for event in parser.feed(read)]
    return events + parser.finish()


def contents(events: list[Event]) -> list[tuple[str | None, str]]:
    return [(event.event, event.data) for event in events]


def cut(stream: bytes, places: list[int]) -> list[bytes]:
    edges = [0, *sorted(place % (len(stream) + 1) for place in places), len(stream)]
    return [stream[start:end] for start, end in pairwise(edges)]


@pytest.mark.parametrize("end", ["\n", "\r", "\r\n"])
def test_each_line_end_is_understood(end: str) -> None:
    stream = f"event: delta{end}data: a{end}data: b{end}{end}data: c{end}{end}".encode()

    assert contents(parse(stream)) == [("delta", "a\nb"), (None, "c")]


@pytest.mark.parametrize(
    ("block", "event", "data"),
    [
        ("data: x", None, "x"),
        ("data:x", None, "x"),
        ("data:  x ", None, " x "),
        ("data: a: b", None, "a: b"),
        ("data: one\ndata: two", None, "one\ntwo"),
        ("data", None, ""),
        ("event: a\nevent: b\ndata: x", "b", "x"),
        ("event:\ndata: x", None, "x"),
        ("id: 1\nretry: 5\nunknown: z\ndata: x", None, "x"),
        (": a comment\ndata: x", None, "x"),
        (": only a comment", None, ""),
        (" data: x", None, ""),
        # Line ends to str.splitlines, but not in an event stream.
        ("data: a\u2028b\x0bc\x85d", None, "a\u2028b\x0bc\x85d"),
    ],
)
def test_fields(block: str, event: str | None, data: str) -> None:
    raw = f"{block}\n\n".encode()

    assert parse(raw) == [Event(event, data, raw)]


def test_a_character_may_be_cut_by_reads() -> None:
    stream = "data: Grüße, 世界 🙂\n\n".encode()

    assert contents(parse(*(bytes([byte]) for byte in stream))) == [(None, "Grüße, 世界 🙂")]


def test_a_byte_order_mark_is_ignored_at_the_start_only() -> None:
    mark = b"\xef\xbb\xbf"

    events = parse(mark[:1], mark[1:] + b"data: a\n\n" + mark + b"data: b\n\n")

    assert contents(events) == [(None, "a"), (None, "")]


@pytest.mark.parametrize("end", [b"\n\n", b"\r\r", b"\r\n\r\n", b"\r\n\r"])
def test_an_event_does_not_wait_for_the_next(end: bytes) -> None:
    assert contents(EventParser().feed(b"data: x" + end)) == [(None, "x")]


def test_a_comment_does_not_wait_for_the_next_event() -> None:
    assert EventParser().feed(b": ping\n\n") == [Event(None, "", b": ping\n\n")]


def test_an_event_without_its_blank_line_is_given_at_the_end() -> None:
    parser = EventParser()

    assert parser.feed(b"data: half") == []
    assert parser.finish() == [Event(None, "half", b"data: half")]
    assert parser.finish() == []


@given(streams, st.lists(st.integers(min_value=0)))
def test_the_raw_bytes_together_are_the_stream(stream: bytes, places: list[int]) -> None:
    assert b"".join(event.raw for event in parse(*cut(stream, places))) == stream


@given(st.binary(max_size=60), st.lists(st.integers(min_value=0)))
def test_any_bytes_are_kept_or_refused(stream: bytes, places: list[int]) -> None:
    try:
        events = parse(*cut(stream, places))
    except UpstreamMalformed:
        with pytest.raises(UnicodeDecodeError):
            stream.decode()
    else:
        assert b"".join(event.raw for event in events) == stream


@given(streams, st.lists(st.integers(min_value=0)))
def test_the_reads_do_not_change_the_events(stream: bytes, places: list[int]) -> None:
    # A LF that a read cut from its CR may stand as a rest of its own at the end: it says nothing.
    def without_rest(events: list[Event]) -> list[tuple[str | None, str]]:
        return contents([event for event in events if event.raw.strip(b"\r\n")])

    assert without_rest(parse(*cut(stream, places))) == without_rest(parse(stream))


@pytest.mark.parametrize("size", [1, 7, 4096])
def test_a_recorded_stream_is_kept(size: int) -> None:
    for path in FIXTURES.glob("*.sse"):
        stream = path.read_bytes()
        events = parse(*(stream[start : start + size] for start in range(0, len(stream), size)))

        assert b"".join(event.raw for event in events) == stream
        assert events[-1] == Event(None, "[DONE]", DONE)
        assert all(event.data.startswith("{") for event in events[:-1])


@pytest.mark.parametrize("reads", [[b"data: secret" + b"x" * 60 + b"\n\n"], [b"secret"] * 20])
def test_an_event_over_the_limit_is_refused(reads: list[bytes]) -> None:
    parser = EventParser(max_event_bytes=64)

    def feed_all() -> None:
        for read in reads:
            parser.feed(read)

    with pytest.raises(UpstreamMalformed, match="limit is 64 bytes") as caught:
        feed_all()

    assert caught.value.code == "upstream_too_large"
    assert "secret" not in caught.value.message


def test_the_limit_is_for_an_event_and_not_for_the_stream() -> None:
    parser = EventParser(max_event_bytes=16)

    assert len(parser.feed(b"data: 12345678\n\n" * 100)) == 100


def test_bytes_that_are_not_utf8_are_refused_without_showing_them() -> None:
    with pytest.raises(UpstreamMalformed, match="not UTF-8") as caught:
        EventParser().feed(b"data: secret \xff\n\n")

    assert "secret" not in caught.value.message
    assert caught.value.__cause__ is None


def test_encode() -> None:
    assert encode("[DONE]") == DONE
    assert encode('{"a":"é"}', "delta") == 'event: delta\ndata: {"a":"é"}\n\n'.encode()
    assert encode("a\nb\r\nc\rd") == b"data: a\ndata: b\ndata: c\ndata: d\n\n"
    assert encode("") == b"data: \n\n"


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r")))
def test_what_was_encoded_is_parsed(data: str) -> None:
    assert contents(parse(encode(data, "delta"))) == [("delta", data)]


def test_a_comment_says_nothing_to_a_client() -> None:
    assert comment("keep\nalive") == b": keep\n: alive\n\n"
    assert contents(parse(comment("data: x\n\ndata: y"))) == [(None, "")]
