"""Connections and the pool that keeps them, against servers on the loopback."""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest
import uvloop

from service import http1, http_pool
from service.http1 import (
    BrokenOff,
    Connection,
    Disconnected,
    HttpError,
    NotConnected,
    Overdue,
    request_head,
)
from service.http_pool import Origin, Pool
from tests.service.test_http1 import CHUNKED, EMPTY, GET, HI, LONG, OK, Run, due_in


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
