"""The HTTP/1.1 client: what it makes of the bytes of an answer, and what it does to connections."""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from service import http1
from service.http1 import (
    BrokenOff,
    Connection,
    Disconnected,
    HttpError,
    Malformed,
    request_head,
)

OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"transfer-encoding: chunked\r\n\r\n"
EMPTY = b"content-length: 0\r\n\r\n"
HI = OK + b"content-length: 2\r\n\r\nhi"
GET = request_head("GET", "/", "h", {}, None)
LIMIT = http1._MAX_HEAD_BYTES
LONG = 20.0

Run = Callable[[Coroutine[Any, Any, None]], None]
Outcome = tuple[int, bytes, type[HttpError] | None, bool]
"""The status (0 where there is none), the body, how it failed, and whether it can be used again."""


class Wire(asyncio.Transport):
    """A transport without a peer, so that a test says where the segments are cut."""

    def __init__(self) -> None:
        super().__init__()
        self.is_aborted = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        pass

    def abort(self) -> None:
        self.is_aborted = True

    def is_closing(self) -> bool:
        return self.is_aborted

    def get_write_buffer_size(self) -> int:
        return 0

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass


async def received(segments: Sequence[bytes], head: bytes = GET) -> tuple[Outcome, Connection]:
    """What comes of an answer in segments, behind which the connection is closed."""
    connection, wire = Connection(asyncio.get_running_loop()), Wire()
    connection.connection_made(wire)
    asking = asyncio.ensure_future(connection.ask(head, None, due_in(LONG)))
    await asyncio.sleep(0)
    for segment in segments:
        if not wire.is_aborted:
            connection.data_received(segment)
    is_usable = connection.is_idle
    connection.eof_received()
    connection.connection_lost(None)
    body: list[bytes] = []
    failure = None
    try:
        await asking
        while piece := await connection.read(due_in(LONG)):
            body.append(piece)
    except HttpError as error:
        failure = type(error)
    return (connection.status, b"".join(body), failure, is_usable), connection


def due_in(seconds: float) -> float:
    return asyncio.get_running_loop().time() + seconds


def outcome(*segments: bytes, head: bytes = GET) -> Outcome:
    return asyncio.run(received(segments, head))[0]


ANSWERS: list[tuple[bytes, Outcome]] = [
    # How the end of a body is found, and whether another answer may follow.
    (HI, (200, b"hi", None, True)),
    (OK + EMPTY, (200, b"", None, True)),
    (CHUNKED + b"2\r\nhi\r\n0\r\n\r\n", (200, b"hi", None, True)),
    (CHUNKED + b'1;a="b;c";d\r\nh\r\n01\r\ni\r\n0;e\r\nX: 1\r\ny:\r\n\r\n',
     (200, b"hi", None, True)),
    (OK + b"Transfer-Encoding:\tCHUNKED \r\n\r\n2\r\nhi\r\n0\r\n\r\n", (200, b"hi", None, True)),
    (OK + b"\r\nhi", (200, b"hi", None, False)),
    (OK + b"connection: close\r\n" + HI[len(OK) :], (200, b"hi", None, False)),
    (b"HTTP/1.1 200\r\n" + EMPTY, (200, b"", None, True)),
    (b"HTTP/1.1 204 No Content\r\n\r\n", (204, b"", None, True)),
    (b"HTTP/1.1 304 Not Modified\r\ncontent-length: 9\r\n\r\n", (304, b"", None, True)),
    (b"HTTP/1.0 200 OK\r\n\r\nhi", (200, b"hi", None, False)),
    (b"HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\nhi", (200, b"hi", None, False)),
    (b"HTTP/1.0 200 OK\r\nconnection: keep-alive\r\n" + EMPTY, (200, b"", None, True)),
    # Interim answers are skipped, an upgrade is an answer without a body.
    (b"HTTP/1.1 100 Continue\r\n\r\n" + HI, (200, b"hi", None, True)),
    (b"HTTP/1.1 103 Early Hints\r\nlink: a\r\ncontent-length: 1\r\n\r\n" * 3 + HI,
     (200, b"hi", None, True)),
    (b"HTTP/1.1 100 Continue\r\n\r\n", (0, b"", Disconnected, False)),
    (b"HTTP/1.1 101 Switching\r\nconnection: upgrade\r\nupgrade: h2c\r\n\r\nhi",
     (101, b"", None, False)),
    (OK + b"connection: upgrade\r\nupgrade: h2c\r\n" + EMPTY, (200, b"", None, True)),
    # What nobody asked for.
    (HI + b"!", (200, b"hi", None, False)),
    (HI + HI, (200, b"hi", None, False)),
    (b"HTTP/1.1 204 No Content\r\ncontent-length: 2\r\n\r\nhi", (204, b"", None, False)),
    (CHUNKED + b"0\r\n\r\n!", (200, b"", None, False)),
    # Less than was said.
    (b"", (0, b"", Disconnected, False)),
    (OK + b"content-le", (0, b"", Disconnected, False)),
    (OK + b"content-length: 3\r\n\r\nhi", (200, b"hi", BrokenOff, False)),
    (CHUNKED, (200, b"", BrokenOff, False)),
    (CHUNKED + b"2\r\nhi\r\n", (200, b"hi", BrokenOff, False)),
    (CHUNKED + b"2\r\nhi\r\n0\r\n", (200, b"hi", BrokenOff, False)),
    # What is no HTTP/1.1: nothing of it is guessed at.
    *(
        (wire, (0, b"", Malformed, False))
        for wire in [
            b"hi",
            b"HTTP/2.0 200 OK\r\n" + EMPTY,
            b"HTTP/0.9 200 OK\r\n" + EMPTY,
            b"HTTP/1.1 20 OK\r\n" + EMPTY,
            b"HTTP/1.1 2000 OK\r\n" + EMPTY,
            b"HTTP/1.1 000 OK\r\n" + EMPTY,
            b"HTTP/1.1 OK\r\n" + EMPTY,
            b"http/1.1 200 OK\r\n" + EMPTY,
            OK + b"x\r\n" + EMPTY,
            OK + b"x a: 1\r\n" + EMPTY,
            OK + b"x : 1\r\n" + EMPTY,
            OK + b": 1\r\n" + EMPTY,
            OK + b"x: 1\x00\r\n" + EMPTY,
            OK + b"x: 1\r2\r\n" + EMPTY,
            OK + b"x: 1\r\n 2\r\n" + EMPTY,
            OK + b"content-length: +2\r\n\r\nhi",
            OK + b"content-length: 2, 2\r\n\r\nhi",
            OK + b"content-length: 2\r\ncontent-length: 2\r\n\r\nhi",
            OK + b"content-length: 99999999999999999999\r\n\r\nhi",
            OK + b"content-length: 2\r\ntransfer-encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n",
            OK + b"transfer-encoding: gzip\r\n\r\nhi",
            OK + b"transfer-encoding: gzip, chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n",
            OK + b"transfer-encoding: chunked\r\n" + CHUNKED[len(OK) :] + b"0\r\n\r\n",
        ]
    ),
    (CHUNKED + b"g\r\n", (200, b"", Malformed, False)),
    (CHUNKED + b"2\r\nhi!\r\n", (200, b"hi", Malformed, False)),
    (CHUNKED + b"0\r\ncontent-length: 2\r\n\r\n", (200, b"", Malformed, False)),
    (CHUNKED + b"2 \r\nhi\r\n", (200, b"", Malformed, False)),
    (CHUNKED + b"2\nhi\n0\n\n", (200, b"", Malformed, False)),
    (CHUNKED + b"ffffffffffffffffff\r\nhi", (200, b"", Malformed, False)),
]  # fmt: skip
answers = pytest.mark.parametrize(("wire", "expected"), ANSWERS, ids=lambda value: repr(value)[:60])


class TestAnswers:
    @answers
    def test_in_one_segment(self, wire: bytes, expected: Outcome) -> None:
        assert outcome(wire) == expected

    @answers
    def test_cut_at_every_byte(self, wire: bytes, expected: Outcome) -> None:
        assert outcome(*(wire[place : place + 1] for place in range(len(wire)))) == expected

    @answers
    def test_cut_anywhere_once(self, wire: bytes, expected: Outcome) -> None:
        async def every_cut() -> None:
            for place in range(1, len(wire)):
                assert (await received([wire[:place], wire[place:]]))[0] == expected, place

        asyncio.run(every_cut())

    @given(
        chunks=st.lists(st.binary(min_size=1, max_size=20), max_size=8),
        extension=st.sampled_from([b"", b";a", b';a="b;c"']),
        trailers=st.sampled_from([b"", b"x: 1\r\n", b"date: 7\r\nx:\r\n"]),
        cuts=st.lists(st.integers(0, 400), max_size=8),
    )
    @example(chunks=[b"0\r\n\r\n"], extension=b"", trailers=b"", cuts=[])
    def test_chunks(
        self, chunks: list[bytes], extension: bytes, trailers: bytes, cuts: list[int]
    ) -> None:
        parts = [b"%x%b\r\n%b\r\n" % (len(chunk), extension, chunk) for chunk in chunks]
        wire = CHUNKED + b"".join(parts) + b"0" + extension + b"\r\n" + trailers + b"\r\n"
        places = [0, *sorted(min(cut, len(wire)) for cut in cuts), len(wire)]
        segments = [wire[a:b] for a, b in pairwise(places) if a < b]

        found, connection = asyncio.run(received(segments))

        assert found == (200, b"".join(chunks), None, True)
        assert connection.headers == [("transfer-encoding", "chunked")]

    def test_headers_are_bytes_in_their_order(self) -> None:
        wire = OK + b"X-A: 1\r\nx-a:  \xff b \t\r\nx-b:\r\n" + EMPTY

        _, connection = asyncio.run(received([wire]))

        assert connection.headers == [
            ("x-a", "1"), ("x-a", "\xff b"), ("x-b", ""), ("content-length", "0"),
        ]  # fmt: skip

    def test_headers_of_interim_answers_and_trailers_are_left_out(self) -> None:
        interim = b"HTTP/1.1 103 Early Hints\r\nlink: a\r\n\r\n"

        _, connection = asyncio.run(received([interim + CHUNKED + b"0\r\nx: 1\r\n\r\n"]))

        assert connection.headers == [("transfer-encoding", "chunked")]

    def test_an_answer_to_head_has_no_body(self) -> None:
        head = request_head("HEAD", "/", "h", {}, None)

        assert outcome(OK + b"content-length: 9\r\n\r\n", head=head) == (200, b"", None, False)

    @pytest.mark.parametrize("size", [1000, LIMIT])
    def test_a_head_of_64_kib_and_no_more(self, size: int) -> None:
        def cut(wire: bytes) -> list[bytes]:
            return [wire[place : place + size] for place in range(0, len(wire), size)]

        filled = OK + b"x: " + b"a" * (LIMIT - len(OK) - 5 - len(EMPTY)) + b"\r\n" + EMPTY
        assert len(filled) == LIMIT

        assert outcome(*cut(filled)) == (200, b"", None, True)
        assert outcome(*cut(filled.replace(b"x: ", b"x: a"))) == (0, b"", Malformed, False)

    @pytest.mark.parametrize("segment", [1000, 1 << 20])
    @pytest.mark.parametrize(
        ("start", "repeated", "expected"),
        [
            (b"", b"HTTP/1.1 100 Continue\r\n\r\n", (0, b"", Malformed, False)),
            (b"", b"\r\n", (0, b"", Malformed, False)),
            (OK, b"x: 1\r\n", (0, b"", Malformed, False)),
            (CHUNKED + b"2\r\nhi\r\n0\r\n", b"x: 1\r\n", (200, b"hi", Malformed, False)),
            (CHUNKED + b"2\r\nhi\r\n0\r\nx:", b"a", (200, b"hi", Malformed, False)),
            (CHUNKED + b"2\r\nhi\r\n2;", b"a", (200, b"hi", Malformed, False)),
        ],
    )
    def test_what_never_ends_is_bounded(
        self, start: bytes, repeated: bytes, expected: Outcome, segment: int
    ) -> None:
        wire = start + repeated * (200_000 // len(repeated))
        segments = [wire[place : place + segment] for place in range(0, len(wire), segment)]

        assert outcome(*segments) == expected


class TestRequests:
    def test_the_head(self) -> None:
        head = request_head("POST", "/v1/a?b=c%20d", "h:1", {"x-a": "1", "x-b": "\xff"}, b"hi")

        assert head == (
            b"POST /v1/a?b=c%20d HTTP/1.1\r\nhost: h:1\r\nx-a: 1\r\nx-b: \xff\r\n"
            b"content-length: 2\r\n\r\n"
        )

    @pytest.mark.parametrize(
        ("target", "sent"),
        [
            ("/a b", "/a%20b"),
            ("/a\r\nx: 1", "/a%0D%0Ax:%201"),
            ("/ü?q=ü#f", "/%C3%BC?q=%C3%BC%23f"),
            ("/a/../%2e//b?[]{}|\"<>\\^`", "/a/../%2e//b?[]{}|\"<>\\^`"),
        ],
    )  # fmt: skip
    def test_what_cannot_stand_in_a_request_line(self, target: str, sent: str) -> None:
        line, _, _ = request_head("GET", target, "h", {}, None).partition(b"\r\n")

        assert line == f"GET {sent} HTTP/1.1".encode()

    @pytest.mark.parametrize(
        ("method", "body", "length"),
        [("GET", None, None), ("DELETE", None, None), ("POST", None, 0), ("PUT", b"", 0)],
    )
    def test_the_length(self, method: str, body: bytes | None, length: int | None) -> None:
        head = request_head(method, "/", "h", {}, body)

        assert head.endswith(b"" if length is None else b"content-length: 0\r\n\r\n")
        assert (b"content-length" in head) == (length is not None)

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("x", "1\r\ny: 2"), ("x", "1\n"), ("x", "1\r"), ("x", "1\0"), ("x", "\u2028"),
            ("x", "\x7f"), ("x\r\ny", "1"), ("x:", "1"), ("", "1"), ("x y", "1"), ("X", "1"),
            ("ü", "1"), ("host", "a"), ("content-length", "1"), ("transfer-encoding", "chunked"),
            ("connection", "upgrade"), ("Content-Length", "1"),
        ],
    )  # fmt: skip
    def test_no_header_can_be_smuggled(self, name: str, value: str) -> None:
        with pytest.raises(ValueError, match=r"character|framing"):
            request_head("GET", "/", "h", {name: value}, None)

    @given(st.text(), st.text(), st.text(min_size=1))
    def test_whatever_is_sent_has_the_lines_that_were_meant(
        self, name: str, value: str, target: str
    ) -> None:
        try:
            head = request_head("POST", "/" + target, "h", {name: value}, b"")
        except (ValueError, UnicodeEncodeError):
            return

        lines = head.split(b"\r\n")
        assert len(lines) == 6
        assert b"".join(lines).count(b"\n") == b"".join(lines).count(b"\r") == 0
        assert lines[2] == f"{name}: {value}".encode("latin-1")
        assert lines[0].count(b" ") == 2
