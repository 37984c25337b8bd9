"""Connections to one server: made when they are needed, and a few kept for the next request."""

from __future__ import annotations

import asyncio
import socket
import ssl
from dataclasses import dataclass
from typing import Any, Final

from service.http1 import (
    TIMER_SECONDS,
    Connection,
    ConnectOverdue,
    Disconnected,
    NotConnected,
    kind_of,
)

# Uvicorn, and so vLLM, closes an idle connection after 5 s: a kept one is given up before.
_IDLE_CONNECTION_SECONDS: Final = 4.0
_MAX_IDLE_CONNECTIONS: Final = 256

# RFC 8305, section 5: how long an address is tried before the next is tried beside it.
_NEXT_ADDRESS_SECONDS: Final = 0.25


@dataclass(frozen=True, slots=True)
class Origin:
    """Where connections lead to; with TLS where there is a ``tls`` context."""

    host: str
    port: int
    tls: ssl.SSLContext | None = None


class Pool:
    """The connections to one origin: as many as are asked for, and a few that are kept."""

    def __init__(self, origin: Origin) -> None:
        self._origin = origin
        self._loop = asyncio.get_running_loop()
        self._open: set[Connection] = set()
        self._idle: list[Connection] = []
        self._sweep: asyncio.TimerHandle | None = None
        self._is_closed = False

    def time(self) -> float:
        """The clock of the deadlines."""
        return self._loop.time()

    def kept(self) -> Connection | None:
        """A connection that was kept, if there is one; the last one used comes first."""
        while self._idle:
            connection = self._idle.pop()
            if connection.is_idle and not self._is_old(connection):
                return connection
            connection.abort()
        return None

    async def connect(self, due: float) -> Connection:
        """A new connection. Raises NotConnected, and Disconnected where the pool is closed."""
        origin = self._origin
        try:
            async with asyncio.timeout_at(due) as deadline:
                sock = await _connected_socket(self._loop, origin.host, origin.port)
                _, connection = await self._loop.create_connection(
                    lambda: Connection(self._loop),
                    sock=sock,
                    ssl=origin.tls,
                    server_hostname=origin.host.rstrip(".") if origin.tls else None,
                )
        except (OSError, ValueError) as error:
            overdue = isinstance(error, TimeoutError) and deadline.expired()
            raise (ConnectOverdue if overdue else NotConnected)(kind_of(error)) from None
        self._open.add(connection)
        connection.lost.add_done_callback(lambda _: self._open.discard(connection))
        if self._is_closed:
            connection.abort()
            raise Disconnected
        return connection

    def give_back(self, connection: Connection) -> None:
        """Keeps a connection whose answer has come to its end, and closes any other."""
        if not connection.is_idle or self._is_closed or len(self._idle) >= _MAX_IDLE_CONNECTIONS:
            connection.abort()
            return
        connection.rest(self._loop.time())
        self._idle.append(connection)
        if self._sweep is None:
            self._sweep = self._loop.call_later(_IDLE_CONNECTION_SECONDS, self._give_up)

    async def close(self) -> None:
        """Closes every connection, those in use too."""
        self._is_closed = True
        if self._sweep is not None:
            self._sweep.cancel()
        self._idle.clear()
        losing = [connection.lost for connection in self._open]
        for connection in list(self._open):
            connection.abort()
        if losing:
            await asyncio.wait(losing, timeout=1)

    def _is_old(self, connection: Connection) -> bool:
        left = connection.idle_since + _IDLE_CONNECTION_SECONDS - self._loop.time()
        return left < TIMER_SECONDS

    def _give_up(self) -> None:
        """Closes what was idle for too long, and comes back for the rest."""
        self._sweep = None
        young = []
        for connection in self._idle:
            if connection.is_idle and not self._is_old(connection):
                young.append(connection)
            else:
                connection.abort()
        self._idle = young
        if young:
            first = young[0].idle_since + _IDLE_CONNECTION_SECONDS
            self._sweep = self._loop.call_at(first, self._give_up)


async def _connected_socket(loop: asyncio.AbstractEventLoop, host: str, port: int) -> socket.socket:
    """A socket to the address of ``host`` that answers first (RFC 8305). Raises OSError."""
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    families = [[a for a in found if a[0] == f] for f in dict.fromkeys(a[0] for a in found)]
    # One address of each family in turn.
    left = [
        family[place] for place in range(len(found)) for family in families if place < len(family)
    ]
    won: list[socket.socket] = []

    async def attempt(family: int, kind: int, protocol: int, address: Any) -> None:
        sock = socket.socket(family, kind, protocol)
        try:
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            await loop.sock_connect(sock, address)
        except BaseException:
            sock.close()
            raise
        if won:
            sock.close()
        else:
            won.append(sock)

    running: set[asyncio.Task[None]] = set()
    failure: BaseException | None = OSError("no address")
    try:
        while not won:
            if left:
                family, kind, protocol, _, address = left.pop(0)
                running.add(loop.create_task(attempt(family, kind, protocol, address)))
            elif not running:
                assert failure is not None
                raise failure
            done, running = await asyncio.wait(
                running,
                timeout=_NEXT_ADDRESS_SECONDS if left else None,
                return_when=asyncio.FIRST_COMPLETED,
            )
            for task in done:
                failure = task.exception() or failure
        return won.pop()
    finally:
        for task in running:
            task.cancel()
        if running:
            await asyncio.wait(running)
        for sock in won:
            sock.close()
