"""The HTTP/1.1 client: what it makes of the bytes of an answer, and what it does to connections."""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from itertools import pairwise
from typing import Any

import pytest
import uvloop
from hypothesis import example, given
from hypothesis import strategies as st

from service import http1, http_pool
from service.http1 import (
    BrokenOff,
    Connection,
    Disconnected,
    HttpError,
    Malformed,
    NotConnected,
    Overdue,
    request_head,
)
from service.http_pool import Origin, Pool

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


@pytest.fixture(params=[asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Run:
    """Runs a test on either loop: the service's own, and the one that other tests run on."""
    runner: Run = request.param
    return runner


Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Coroutine[Any, Any, None]]


@asynccontextmanager
async def pool_to(handler: Handler) -> AsyncIterator[Pool]:
    """A pool of connections to a server, where ``handler`` gets them."""
    tasks: set[asyncio.Task[None]] = set()

    async def handled(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await handler(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(asyncio.create_task(handled(reader, writer)))

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    pool = Pool(Origin(*server.sockets[0].getsockname()))
    try:
        async with asyncio.timeout(LONG):
            yield pool
    finally:
        await pool.close()
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert not pool._open


def answering(*wires: bytes) -> Handler:
    """Answers the requests of a connection, and closes it behind the last answer."""

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for wire in wires:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(wire)

    return handler


async def body_of(connection: Connection) -> bytes:
    pieces = []
    while piece := await connection.read(due_in(LONG)):
        pieces.append(piece)
    return b"".join(pieces)


async def asked(pool: Pool) -> tuple[Connection, bytes]:
    """One call as a caller makes it."""
    connection = pool.kept() or await pool.connect(due_in(LONG))
    await connection.ask(GET, None, due_in(LONG))
    body = await body_of(connection)
    pool.give_back(connection)
    return connection, body


class TestConnections:
    def test_one_answer_after_the_other(self, run: Run) -> None:
        async def test() -> None:
            async with pool_to(answering(HI, CHUNKED + b"0\r\n\r\n", HI)) as pool:
                calls = [await asked(pool) for _ in range(3)]

            assert [body for _, body in calls] == [b"hi", b"", b"hi"]
            assert len({connection for connection, _ in calls}) == 1

        run(test())

    @pytest.mark.parametrize(
        "wire",
        [HI + b"!", HI + HI, OK + b"connection: close\r\n" + EMPTY, b"HTTP/1.0 200 OK\r\n" + EMPTY],
    )
    def test_a_connection_that_is_not_kept(self, run: Run, wire: bytes) -> None:
        async def test() -> None:
            async with pool_to(answering(wire, HI)) as pool:
                first, _ = await asked(pool)
                assert pool.kept() is None
                await asyncio.wait_for(first.lost, LONG)

        run(test())

    def test_what_comes_unasked_ends_a_kept_connection(self, run: Run) -> None:
        async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(HI)
            await asyncio.sleep(0.05)
            writer.write(HI)
            await reader.read()

        async def test() -> None:
            async with pool_to(handler) as pool:
                connection, _ = await asked(pool)
                await asyncio.wait_for(connection.lost, LONG)
                assert pool.kept() is None

        run(test())

    def test_one_that_the_server_closed_is_not_used_again(self, run: Run) -> None:
        async def test() -> None:
            async with pool_to(answering(HI)) as pool:
                connection, body = await asked(pool)
                await asyncio.wait_for(connection.lost, LONG)
                assert pool.kept() is None
                assert body == b"hi"

        run(test())

    def test_an_answer_that_ends_with_the_connection(self, run: Run) -> None:
        async def test() -> None:
            async with pool_to(answering(OK + b"\r\n" + b"x" * 1_000_000)) as pool:
                _, body = await asked(pool)
                assert len(body) == 1_000_000

        run(test())

    def test_a_reset_is_no_end(self, run: Run) -> None:
        async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(OK + b"\r\nhi")
            await asyncio.sleep(0.05)
            # Closing with zero linger sends a reset.
            writer.get_extra_info("socket").setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0"
            )
            writer.transport.abort()

        async def test() -> None:
            async with pool_to(handler) as pool:
                connection = await pool.connect(due_in(LONG))
                await connection.ask(GET, None, due_in(LONG))
                with pytest.raises(BrokenOff) as caught:
                    await body_of(connection)
                assert caught.value.kind == "ConnectionResetError, ECONNRESET"

        run(test())

    def test_an_answer_before_the_request_was_sent_whole(self, run: Run) -> None:
        async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(HI)
            await asyncio.sleep(LONG)

        async def test() -> None:
            async with pool_to(handler) as pool:
                connection = await pool.connect(due_in(LONG))
                body = b"x" * (1 << 25)
                head = request_head("POST", "/", "h", {}, body)
                await connection.ask(head, body, due_in(LONG))
                assert await body_of(connection) == b"hi"
                pool.give_back(connection)
                assert pool.kept() is None

        run(test())

    def test_a_large_request_arrives_whole(self, run: Run) -> None:
        body = bytes(range(256)) * 10_000
        sent: list[bytes] = []

        async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            sent.append(await reader.readexactly(len(body)))
            writer.write(HI)

        async def test() -> None:
            async with pool_to(handler) as pool:
                connection = await pool.connect(due_in(LONG))
                head = request_head("POST", "/", "h", {}, body)
                await connection.ask(head, body, due_in(LONG))

        run(test())
        assert sent == [body]

    def test_a_slow_reader_slows_the_server_down(self, run: Run) -> None:
        total, written = 1 << 26, 0

        async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal written
            await reader.readuntil(b"\r\n\r\n")
            writer.write(OK + b"content-length: %d\r\n\r\n" % total)
            while written < total:
                writer.write(b"x" * (1 << 16))
                await writer.drain()
                written += 1 << 16

        async def test() -> None:
            async with pool_to(handler) as pool:
                connection = await pool.connect(due_in(LONG))
                await connection.ask(GET, None, due_in(LONG))
                before = -1
                while before < written:
                    before = written
                    await asyncio.sleep(0.2)
                # The rest lies in the sockets of the kernel, or was not even written.
                assert written < total // 2
                assert connection._buffered <= http1._MAX_BUFFERED_BYTES + (1 << 18)
                assert len(await body_of(connection)) == total
                assert connection.is_idle

        run(test())

    def test_deadlines(self, run: Run) -> None:
        async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(OK + b"content-length: 4\r\n\r\nhi")
            await reader.readuntil(b"\r\n\r\n")

        async def test() -> None:
            loop = asyncio.get_running_loop()
            async with pool_to(handler) as pool:
                connection = await pool.connect(due_in(LONG))
                await connection.ask(GET, None, due_in(LONG))
                assert await connection.read(due_in(LONG)) == b"hi"
                # A timer that was set for later does not make this one late, nor the next early.
                for seconds in (0.05, 0.15):
                    started = loop.time()
                    with pytest.raises(Overdue):
                        await connection.read(due_in(seconds))
                    assert seconds - 0.01 < loop.time() - started < seconds + 2
                pool.give_back(connection)
                assert pool.kept() is None

                silent = await pool.connect(due_in(LONG))
                with pytest.raises(Overdue):
                    await silent.ask(GET[:-2], None, due_in(0.05))
                assert not silent.is_idle

        run(test())

    def test_cancelling_closes_at_once(self, run: Run) -> None:
        closed = asyncio.Event()

        async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            await reader.read()
            closed.set()

        async def test() -> None:
            async with pool_to(handler) as pool:
                connection = await pool.connect(due_in(LONG))
                asking = asyncio.ensure_future(connection.ask(GET, None, due_in(LONG)))
                await asyncio.sleep(0.05)
                asking.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await asking
                await asyncio.wait_for(closed.wait(), 5)

        run(test())


class TestPool:
    def test_an_idle_connection_is_given_up(
        self, run: Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(http_pool, "_IDLE_CONNECTION_SECONDS", 0.1)

        async def test() -> None:
            async with pool_to(answering(HI, HI)) as pool:
                first, _ = await asked(pool)
                second, _ = await asked(pool)
                assert first is second
                await asyncio.wait_for(first.lost, 5)
                assert pool.kept() is None

        run(test())

    def test_so_many_are_kept(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(http_pool, "_MAX_IDLE_CONNECTIONS", 2)

        async def test() -> None:
            async with pool_to(answering(HI, HI)) as pool:
                connections = [await pool.connect(due_in(LONG)) for _ in range(3)]
                for connection in connections:
                    await connection.ask(GET, None, due_in(LONG))
                    pool.give_back(connection)
                assert pool.kept() is connections[1]  # the last one that was kept comes first
                assert pool.kept() is connections[0]
                assert pool.kept() is None
                await asyncio.wait_for(connections[2].lost, 5)

        run(test())

    def test_nothing_is_left_open_by_closing(self, run: Run) -> None:
        async def test() -> None:
            async with pool_to(answering(HI, b"", HI)) as pool:
                await asked(pool)
                running = pool.kept()
                assert running is not None
                idle, _ = await asked(pool)
                assert idle is not running
                asking = asyncio.ensure_future(running.ask(GET, None, due_in(LONG)))
                await asyncio.sleep(0.05)
                await pool.close()
                with pytest.raises(HttpError):
                    await asking
                assert not pool._open
                with pytest.raises(Disconnected):
                    await pool.connect(due_in(LONG))

        run(test())

    @pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "x." * 200 + "invalid", "x" * 70])
    def test_no_connection(self, run: Run, host: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]

        async def test() -> None:
            with pytest.raises(NotConnected) as caught:
                await Pool(Origin(host, port)).connect(due_in(LONG))
            assert host not in caught.value.kind

        run(test())

    async def test_an_address_that_does_not_answer_does_not_keep_the_others_waiting(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        loop = asyncio.get_running_loop()
        with socket.socket() as full:
            # With its queue full, Linux lets further connections to it wait.
            full.bind(("127.0.0.1", 0))
            full.listen(0)
            waiting = [socket.socket() for _ in range(4)]
            for sock in waiting:
                sock.setblocking(False)
                sock.connect_ex(full.getsockname())
            async with pool_to(answering(HI)) as pool:
                found = [
                    (socket.AF_INET, socket.SOCK_STREAM, 6, "", address)
                    for address in (full.getsockname(), ("127.0.0.1", pool._origin.port))
                ]

                async def getaddrinfo(*_: object, **__: object) -> list[Any]:
                    return found

                monkeypatch.setattr(loop, "getaddrinfo", getaddrinfo)
                started = loop.time()
                _, body = await asked(pool)
                assert body == b"hi"
                assert http_pool._NEXT_ADDRESS_SECONDS - 0.01 < loop.time() - started < 5
                monkeypatch.setattr(http_pool, "_NEXT_ADDRESS_SECONDS", LONG)
                with pytest.raises(http1.ConnectOverdue):
                    await pool.connect(due_in(0.1))
            for sock in waiting:
                sock.close()
