"""An HTTP/1.1 client over asyncio: connections that carry one request at a time.

Only what a proxy needs: no redirects, cookies, codings or upgrades. httptools (llhttp, strict)
reads the answers. Whatever a socket, TLS or the parser raises leaves here as an HttpError.
"""

from __future__ import annotations

import asyncio
import errno
import re
import ssl
from collections.abc import Mapping
from typing import Final, cast
from urllib.parse import quote

import httptools

_MAX_HEAD_BYTES: Final = 1 << 16
"""Bytes that an answer may take without a byte of its body: status line and headers, interim
answers included, and later a chunk's extensions or the trailers."""

_MAX_BUFFERED_BYTES: Final = 1 << 18
"""Bytes of a body that wait for a slow reader, before nothing more is read from the socket."""

_MAX_JOINED_BYTES: Final = 1 << 16
"""Bodies up to this size are sent in one piece with their head."""

TIMER_SECONDS: Final = 0.001
"""How much too early a loop's timer may run: uvloop counts in milliseconds."""

_HAVE_BODY: Final = frozenset({"POST", "PUT", "PATCH"})
_FRAMING: Final = frozenset({"host", "content-length", "transfer-encoding", "connection"})
_TARGET: Final = re.compile(r"/[!\"$-~]*+")
_SENT_AS_IT_IS: Final = "".join(map(chr, range(0x21, 0x7F))).replace("#", "")
# RFC 9110, sections 5.1 and 5.5; nothing that could end a line is in it.
_HEAD: Final = re.compile(
    r"[A-Z]++ [!-~]++ HTTP/1\.1\r\n"
    r"(?:[!#$%&'*+\-.^_`|~0-9a-z]++: [\t\x20-\x7e\x80-\xff]*+\r\n)*+\r\n"
)


class HttpError(Exception):
    """A request that failed. ``kind`` is a word or two about it, never foreign text."""

    def __init__(self, kind: str = "") -> None:
        super().__init__(kind)
        self.kind = kind


class NotConnected(HttpError):
    """No connection could be made."""


class ConnectOverdue(NotConnected):
    """No connection was made by its deadline."""


class Overdue(HttpError):
    """Nothing came by the deadline."""


class Disconnected(HttpError):
    """The connection was closed before the answer's headers had come."""


class ConnectionFailed(HttpError):
    """The connection failed in another way before the answer's headers had come."""


class BrokenOff(HttpError):
    """The connection ended before the body did."""


class Malformed(HttpError):
    """The answer is not valid HTTP, or its head is too large."""


class _Refused(Exception):
    """Raised to the parser, to stop it."""


def request_head(
    method: str, target: str, host: str, headers: Mapping[str, str], body: bytes | None
) -> bytes:
    """The request line and the headers, ``host`` and ``content-length`` among them.

    ``target`` is a path and a query; what cannot stand in a request line is percent-encoded. Names
    of headers are lower case. Raises ValueError for what is no header, or is ours to set.
    """
    if _TARGET.fullmatch(target) is None:
        target = quote(target, safe=_SENT_AS_IT_IS)
    if not _FRAMING.isdisjoint(headers):
        raise ValueError("A request's framing is not the caller's to say.")
    lines = [f"{method} {target} HTTP/1.1\r\nhost: {host}\r\n"]
    lines += [f"{name}: {value}\r\n" for name, value in headers.items()]
    if body is not None or method in _HAVE_BODY:
        lines.append(f"content-length: {len(body or b'')}\r\n")
    lines.append("\r\n")
    head = "".join(lines)
    # The first of the lines is two, each of the others is one: no value holds a line of its own.
    if _HEAD.fullmatch(head) is None or head.count("\n") != len(lines) + 1:
        raise ValueError("A method or a header has characters that HTTP does not allow.")
    return head.encode("latin-1")


class Connection(asyncio.Protocol):
    """One connection, which carries one request after the other.

    After ``ask`` there are ``status`` and ``headers`` (names in lower case, ISO 8859-1), and
    ``read`` gives the body. Deadlines are times of the loop.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._parser = httptools.HttpResponseParser(self)
        self._waiter: asyncio.Future[bool] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._timer_due = self._due = 0.0
        self._pieces: list[bytes] = []
        self._is_paused = False
        self._is_kept_alive = True
        self.lost: asyncio.Future[None] = loop.create_future()
        """Done once the transport is closed."""
        self.idle_since = 0.0
        self._reset(is_head=False)
        self._is_complete = True

    def _reset(self, *, is_head: bool) -> None:
        self.status = 0
        self.headers: list[tuple[str, str]] = []
        self.content_length: int | None = None
        self.has_begun = False
        """Whether a byte of the answer has come."""
        self._failure: HttpError | None = None
        self._buffered = 0
        self._left = _MAX_HEAD_BYTES
        self._is_head = is_head
        self._is_bounded = True
        self._is_complete = self._is_interim = self._is_moving = self._until_close = False

    async def ask(self, head: bytes, body: bytes | None, due: float) -> None:
        """Sends a request and waits for the head of its answer. Raises HttpError.

        A call that fails, or is cancelled, closes the connection at once.
        """
        self._reset(is_head=head.startswith(b"HEAD "))
        if body is None:
            self._transport.write(head)
        elif len(body) <= _MAX_JOINED_BYTES:
            self._transport.write(head + body)
        else:
            self._transport.write(head)
            self._transport.write(body)
        try:
            while not self.status:
                if self._failure is not None:
                    raise self._failure
                await self._wait(due)
        except BaseException:
            self.abort()
            raise

    async def read(self, due: float) -> bytes:
        """What has come of the body, waiting for it if need be; empty at its end.

        Raises HttpError. It is for the caller to abort then.
        """
        while not self._pieces:
            if self._is_complete:
                return b""
            if self._failure is not None:
                raise self._failure
            await self._wait(due)
        pieces = self._pieces
        whole = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        pieces.clear()
        self._buffered = 0
        self._resume()
        return whole

    @property
    def is_idle(self) -> bool:
        """Whether it can carry another request."""
        return (
            self._is_complete
            and self._is_kept_alive
            and not self._transport.is_closing()
            # An answer may come before its request was sent to the end.
            and not self._transport.get_write_buffer_size()
        )

    def rest(self, now: float) -> None:
        """Drops what nobody read; the connection is kept for another request."""
        self.idle_since = now
        self._pieces.clear()
        self._resume()

    def abort(self) -> None:
        """Closes the connection at once."""
        self._is_kept_alive = False
        self._end(None)
        self._transport.abort()

    async def _wait(self, due: float) -> None:
        """Until anything has come. Raises Overdue."""
        # The timer is left alone where it runs too early: it looks then whether it is due.
        self._due = due
        if self._timer is None or due < self._timer_due:
            self._set_timer()
        self._waiter = self._loop.create_future()
        try:
            if not await self._waiter:
                raise Overdue
        finally:
            self._waiter = None

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer_due = self._due
        self._timer = self._loop.call_at(self._due, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        if self._waiter is None:
            return
        if self._loop.time() < self._due - TIMER_SECONDS:
            self._set_timer()
        elif not self._waiter.done():
            self._waiter.set_result(False)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(True)

    def _resume(self) -> None:
        if self._is_paused:
            self._is_paused = False
            self._transport.resume_reading()

    def _end(self, error: Exception | None) -> None:
        """Nothing more comes: the answer, if it has not ended, fails."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if not self._is_complete and self._failure is None:
            kind = "" if error is None else kind_of(error)
            if self.status:
                self._failure = BrokenOff(kind)
            elif error is None or isinstance(error, (ConnectionResetError, BrokenPipeError)):
                self._failure = Disconnected(kind)
            else:
                self._failure = ConnectionFailed(kind)
        self._wake()

    # What the transport calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._is_kept_alive = False
        self._end(exc)
        if not self.lost.done():
            self.lost.set_result(None)

    def eof_received(self) -> None:
        if self._until_close:
            self._is_complete = True
            self._wake()

    def data_received(self, data: bytes) -> None:
        if self._is_complete or self._failure is not None:
            self.abort()  # nobody asked for it
            return
        self.has_begun = True
        try:
            self._feed(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade, _Refused) as error:
            if not self._is_complete:
                self._failure = Malformed(type(error).__name__)
            self.abort()
            return
        if self._buffered > _MAX_BUFFERED_BYTES and not self._is_paused:
            self._is_paused = True
            self._transport.pause_reading()
        self._wake()

    def _feed(self, data: bytes) -> None:
        while data and self._is_bounded:
            piece = data[: self._left]
            self._is_moving = False
            self._parser.feed_data(piece)
            if self._is_moving:
                self._left = _MAX_HEAD_BYTES
            else:
                self._left -= len(piece)
                if not self._left and not self._is_complete:
                    raise _Refused
            data = data[len(piece) :]
        if data:
            self._parser.feed_data(data)

    # What the parser calls. An exception stops it, and it raises one of its own.

    def on_message_begin(self) -> None:
        if self._is_complete:
            raise _Refused  # nobody asked for another answer

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self.status:  # later they are trailers, of which nothing is made
            self.headers.append(
                (name.decode("latin-1").lower(), value.decode("latin-1").strip(" \t"))
            )

    def on_headers_complete(self) -> None:
        parser = self._parser
        status = parser.get_status_code()
        if status < 100 or parser.get_http_version() not in ("1.1", "1.0"):
            raise _Refused
        if status < 200 and status != 101:
            self._is_interim = True
            self.headers.clear()
            return
        is_chunked = False
        for name, value in self.headers:
            if name == "content-length":
                self.content_length = int(value)
            elif name == "transfer-encoding":
                if is_chunked or value.lower() != "chunked":
                    raise _Refused  # a coding that nobody here undoes
                is_chunked = True
        self.status = status
        self._is_moving = True
        self._is_kept_alive = parser.should_keep_alive()
        if status == 101 or self._is_head:
            self._is_kept_alive = False
            self._is_complete = True
        elif not is_chunked and status not in (204, 304):
            self._is_bounded = False
            self._until_close = self.content_length is None

    def on_body(self, body: bytes) -> None:
        if not self._is_complete:
            self._is_moving = True
            self._pieces.append(body)
            self._buffered += len(body)

    def on_message_complete(self) -> None:
        if self._is_interim:
            self._is_interim = False
        else:
            self._is_complete = True


def kind_of(error: BaseException) -> str:
    """The class of an error, and the name of its number: nothing of its message."""
    number = error.errno if isinstance(error, OSError) else None
    symbol = None if isinstance(error, ssl.SSLError) else errno.errorcode.get(number or 0)
    name = type(error).__name__
    return f"{name}, {symbol}" if symbol else name
