"""The client of the upstream: bounded in time and size, and the one border for its errors.

Every call ends by a deadline, every body by a limit, and whatever aiohttp, asyncio or the socket
raises leaves here as an UpstreamError. Cancelling a call closes its connection at once, so that
the upstream stops generating.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from types import TracebackType
from urllib.parse import urlsplit

import aiohttp
from aiohttp.http import HttpProcessingError

from service.errors import (
    ConfigurationError,
    UpstreamError,
    UpstreamMalformed,
    UpstreamTimeout,
    UpstreamUnreachable,
)
from service.headers import Headers, header

# Uvicorn, and so vLLM, closes an idle connection after 5 s: a pooled one is given up before.
_IDLE_CONNECTION_SECONDS = 4.0

_CREDENTIALS = ("authorization", "x-api-key")


def parse_base_url(url: str) -> str:
    """The address that paths such as `/v1/models` are added to.

    A trailing slash and a trailing `/v1` are taken off, so that both usual ways of writing it
    work. Raises ConfigurationError, without showing the URL: it may hold a password.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if not host or port == 0 or not url.isprintable() or " " in url:
        raise ConfigurationError(
            "The upstream URL is not one that can be used. Write it as http://host:8000."
        )
    if parts.scheme not in ("http", "https"):
        raise ConfigurationError("The upstream URL must begin with http:// or https://.")
    if parts.username is not None or parts.password is not None:
        raise ConfigurationError(
            "The upstream URL holds a user name or a password. Set the upstream's key instead."
        )
    if parts.query or parts.fragment:
        raise ConfigurationError("The upstream URL must end before any '?' or '#'.")
    path = parts.path.rstrip("/").removesuffix("/v1").rstrip("/")
    return f"{parts.scheme}://{parts.netloc}{path}"


def _trust(ca_file: Path | None) -> ssl.SSLContext | bool:
    """Whom to trust over TLS: the certificates of a file, or the system's."""
    if ca_file is None:
        return True
    try:
        return ssl.create_default_context(cafile=ca_file)
    except OSError as error:
        reason = error.strerror or "it holds no certificate"
        raise ConfigurationError(f"ca_file {ca_file} cannot be used: {reason}") from error


@dataclass(frozen=True, slots=True)
class Deadlines:
    """How long the upstream may take, in seconds.

    ``connect``: until there is a connection. ``first_byte``: from the start until the answer
    begins, connecting included. ``idle``: between two reads of an answer. ``total``: from the
    start until the answer has ended.
    """

    connect: float
    first_byte: float
    idle: float
    total: float


@dataclass(frozen=True, slots=True)
class UpstreamResponse:
    """A whole answer: ``body`` as it came, ``seconds`` from the start of the call to its end."""

    status: int
    headers: Headers
    body: bytes
    seconds: float


# The most specific first. TimeoutError is an OSError, and many of aiohttp's are an OSError too.
_ERRORS: tuple[tuple[type[Exception], type[UpstreamError], str], ...] = (
    (
        aiohttp.ConnectionTimeoutError,
        UpstreamUnreachable,
        "No connection to the upstream within the connect deadline. Check that it runs.",
    ),
    (TimeoutError, UpstreamTimeout, "The upstream did not answer in time."),
    (
        aiohttp.ClientConnectorError,
        UpstreamUnreachable,
        "No connection to the upstream. Check that it runs, and that its URL is right.",
    ),
    (
        aiohttp.ServerFingerprintMismatch,
        UpstreamUnreachable,
        "The upstream's certificate is not the expected one.",
    ),
    (
        aiohttp.ClientConnectionError,
        UpstreamError,
        "The upstream closed the connection before it had answered.",
    ),
    (
        aiohttp.ClientPayloadError,
        UpstreamMalformed,
        "The upstream's answer broke off before its end.",
    ),
    (aiohttp.ClientResponseError, UpstreamMalformed, "The upstream's answer is not valid HTTP."),
    (HttpProcessingError, UpstreamMalformed, "The upstream's answer is not valid HTTP."),
    (aiohttp.InvalidURL, UpstreamUnreachable, "The upstream's URL cannot be used."),
    (aiohttp.RedirectClientError, UpstreamUnreachable, "The upstream's URL cannot be used."),
    (aiohttp.NonHttpUrlClientError, UpstreamUnreachable, "The upstream's URL cannot be used."),
    (aiohttp.ClientError, UpstreamError, "The request to the upstream failed."),
    (OSError, UpstreamError, "The connection to the upstream failed."),
)


def _ours(error: Exception) -> UpstreamError | None:
    """The error of ours for a foreign one, or None where it is not the upstream's.

    Its message names the kind of the foreign error and never quotes it: that may hold content.
    """
    for foreign, ours, sentence in _ERRORS:
        if isinstance(error, foreign):
            kind = type(error).__name__
            number = error.errno if isinstance(error, OSError) else None
            symbol = errno.errorcode.get(number or 0)
            return ours(f"{sentence} ({kind}, {symbol})" if symbol else f"{sentence} ({kind})")
    return None


class _Border:
    """One wait for the upstream: it ends by a deadline, and foreign errors leave it as ours."""

    __slots__ = ("_name", "_seconds", "_timeout")

    def __init__(self, name: str, seconds: float, started: float, total: float) -> None:
        self._name, self._seconds = name, seconds
        left = started + total - perf_counter()
        if left < seconds:
            self._name, self._seconds = "total", total
        self._timeout = asyncio.timeout(min(seconds, left))

    async def __aenter__(self) -> None:
        await self._timeout.__aenter__()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            await self._timeout.__aexit__(kind, error, traceback)
        except TimeoutError:
            raise UpstreamTimeout(
                f"The upstream did not answer in time: its {self._name} deadline is "
                f"{self._seconds:g} s."
            ) from None
        if isinstance(error, Exception) and (ours := _ours(error)) is not None:
            raise ours from None


@dataclass(slots=True)
class _Call:
    """Whether the call that runs in this context had to open a connection."""

    connected: bool = False


_CALL: ContextVar[_Call] = ContextVar("call")


def _open_socket(address: aiohttp.AddrInfoType) -> socket.socket:
    """A socket for aiohttp, which asks for one only where no pooled connection was left."""
    _CALL.get().connected = True
    family, kind, protocol, _, _ = address
    return socket.socket(family, kind, protocol)


def _closed_unanswered(error: aiohttp.ClientError) -> bool:
    """Whether the connection was closed with no answer begun."""
    if isinstance(error, aiohttp.ServerDisconnectedError):
        # Where an answer had begun, aiohttp puts what there is of it in place of the message.
        return isinstance(error.message, str)
    return isinstance(error, aiohttp.ClientOSError) and error.errno in (
        errno.ECONNRESET,
        errno.EPIPE,
    )


class UpstreamStream:
    """An answer whose status and headers have come, and whose body is still to be read."""

    def __init__(
        self,
        response: aiohttp.ClientResponse,
        deadlines: Deadlines,
        max_body_bytes: int,
        started: float,
    ) -> None:
        self._response = response
        self._deadlines = deadlines
        self._max_body_bytes = max_body_bytes
        self._started = started
        self._read = 0
        self.status: int = response.status
        # ISO 8859-1 gives each byte a character, and so any value can be passed on as it was.
        self.headers: Headers = tuple(
            (name.decode("latin-1").lower(), value.decode("latin-1"))
            for name, value in response.raw_headers
        )

    def check(self) -> None:
        """Raises UpstreamError for an answer that is not one to be judged and passed on.

        A redirect is not passed on: the client would follow it past the guard.
        """
        if self.status < 200 or 300 <= self.status < 400:
            raise UpstreamError(
                f"The upstream answered with status {self.status}, which is not passed on. "
                "Set the upstream URL to where the model is served."
            )
        coding = header(self.headers, "content-encoding")
        if coding is not None and coding.strip().lower() not in ("", "identity"):
            raise UpstreamMalformed(
                "The upstream's answer is compressed, though it was asked for as it is, "
                "and so it cannot be judged. Turn compression off at the upstream."
            )
        length = self._response.content_length
        if length is not None:
            self._check_size(length)

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body as it comes, in pieces of any size; to be read once.

        Reading slowly slows the upstream down. Only waiting for it counts against the idle
        deadline, not the time that the reader takes.
        """
        while chunk := await self._next():
            yield chunk

    async def read(self) -> bytes:
        """The whole body."""
        chunks = []
        while chunk := await self._next():
            chunks.append(chunk)
        return b"".join(chunks)

    def close(self) -> None:
        """Closes the connection, unless the answer was read to its end and gave it back."""
        if not self._response.closed:
            self._response.close()

    async def _next(self) -> bytes:
        """The next piece; empty at the end."""
        content = self._response.content
        if content.is_eof():
            chunk = content.read_nowait()
        else:
            limits = self._deadlines
            async with _Border("idle", limits.idle, self._started, limits.total):
                chunk = await content.readany()
        self._read += len(chunk)
        self._check_size(self._read)
        return chunk

    def seconds(self) -> float:
        """The time since the start of the call."""
        return perf_counter() - self._started

    def _check_size(self, size: int) -> None:
        if size > self._max_body_bytes:
            raise UpstreamMalformed(
                "The upstream's answer is too large to be judged: the limit is "
                f"{self._max_body_bytes} bytes.",
                code="upstream_too_large",
            )


class Upstream:
    """An OpenAI-compatible server, by default over a pool of kept connections.

    ``base_url`` is `http://host:8000` or `http://host:8000/v1`; paths begin with `/v1`. With an
    ``api_key`` the client's own credentials are replaced. Redirects are not followed, cookies are
    not kept, and no proxy is taken from the environment. How many calls run at once is for the
    caller to bound: each holds one connection.

    A call is made a second time only where a kept connection was closed before an answer began,
    as servers do that give an idle connection up while a request is on its way. That is safe:
    aiohttp asked for no new socket, so the connection was an old one; nothing of an answer has
    been passed on; and a generation changes nothing at the upstream, so that at worst one is
    computed twice.
    """

    def __init__(
        self,
        base_url: str,
        *,
        api_key: str | None,
        deadlines: Deadlines,
        max_body_bytes: int,
        ca_file: Path | None = None,
    ) -> None:
        self._base_url = parse_base_url(base_url)
        self._deadlines = deadlines
        self._max_body_bytes = max_body_bytes
        self._authorization = f"Bearer {api_key}" if api_key is not None else None
        if api_key is not None and not (api_key.isascii() and api_key.isprintable()):
            raise ConfigurationError("The upstream's key may hold printable ASCII only.")
        self._trust = _trust(ca_file)
        self._session: aiohttp.ClientSession | None = None

    async def open(self) -> None:
        """Makes the pool; connections are made when they are needed."""
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=0,
                keepalive_timeout=_IDLE_CONNECTION_SECONDS,
                socket_factory=_open_socket,
                ssl=self._trust,
            ),
            # The other deadlines are kept here, where a slow reader is not a slow upstream.
            timeout=aiohttp.ClientTimeout(total=None, connect=self._deadlines.connect),
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=False,
            # Nothing is said that the client did not say.
            skip_auto_headers=("Accept", "Accept-Encoding", "Content-Type", "User-Agent"),
        )

    async def close(self) -> None:
        """Closes every connection, those in use too."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def get(self, path: str, headers: Mapping[str, str]) -> UpstreamResponse:
        """The whole answer to a GET. Raises UpstreamError."""
        return await self._whole("GET", path, None, headers)

    async def post(self, path: str, body: bytes, headers: Mapping[str, str]) -> UpstreamResponse:
        """The whole answer to ``body``, sent as it is. Raises UpstreamError.

        ``headers`` are those that ``request_headers`` gives.
        """
        return await self._whole("POST", path, body, headers)

    async def send(
        self, method: str, path: str, body: bytes | None, headers: Mapping[str, str]
    ) -> UpstreamResponse:
        """The whole answer to a request of any method. Raises UpstreamError."""
        return await self._whole(method, path, body, headers)

    @asynccontextmanager
    async def stream(
        self, path: str, body: bytes, headers: Mapping[str, str]
    ) -> AsyncIterator[UpstreamStream]:
        """An answer to be read as it comes. Raises UpstreamError, here and while it is read.

        Leaving the block before the end of the answer closes the connection.
        """
        answer = await self._begin("POST", path, body, headers)
        try:
            yield answer
        finally:
            answer.close()

    async def _whole(
        self, method: str, path: str, body: bytes | None, headers: Mapping[str, str]
    ) -> UpstreamResponse:
        answer = await self._begin(method, path, body, headers)
        try:
            whole = await answer.read()
        finally:
            answer.close()
        return UpstreamResponse(answer.status, answer.headers, whole, answer.seconds())

    async def _begin(
        self, method: str, path: str, body: bytes | None, headers: Mapping[str, str]
    ) -> UpstreamStream:
        """An answer that has begun; it is for the caller to close."""
        sent = dict(headers)
        sent["accept-encoding"] = "identity"
        if self._authorization is not None:
            for name in _CREDENTIALS:
                sent.pop(name, None)
            sent["authorization"] = self._authorization
        limits = self._deadlines
        started = perf_counter()  # uvloop's own clock counts in milliseconds
        async with _Border("first-byte", limits.first_byte, started, limits.total):
            response = await self._request(method, self._base_url + path, body, sent)
        answer = UpstreamStream(response, limits, self._max_body_bytes, started)
        try:
            answer.check()
        except BaseException:
            answer.close()
            raise
        return answer

    async def _request(
        self, method: str, url: str, body: bytes | None, headers: dict[str, str]
    ) -> aiohttp.ClientResponse:
        if self._session is None:
            raise RuntimeError("Upstream.open() comes before the first call.")
        call = _Call()
        token = _CALL.set(call)
        try:
            try:
                return await self._session.request(
                    method, url, data=body, headers=headers, allow_redirects=False
                )
            except aiohttp.ClientError as error:
                if call.connected or not _closed_unanswered(error):
                    raise
            return await self._session.request(
                method, url, data=body, headers=headers, allow_redirects=False
            )
        finally:
            _CALL.reset(token)
