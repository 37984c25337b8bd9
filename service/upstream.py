"""The client of the upstream: bounded in time and size, and the one border for its errors.

Every call ends by a deadline, every body by a limit, and whatever http1 raises leaves here as an
UpstreamError. Cancelling a call closes its connection at once, so that the upstream stops
generating.
"""

from __future__ import annotations

import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from urllib.parse import urlsplit

from service import http1, http_pool
from service.caller import CREDENTIALS, UPSTREAM_KEY
from service.errors import (
    ConfigurationError,
    UpstreamError,
    UpstreamMalformed,
    UpstreamTimeout,
    UpstreamUnreachable,
)
from service.headers import Headers, header


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


def _origin(base_url: str, ca_file: Path | None) -> http_pool.Origin:
    """Where a base URL leads to, and whom to trust there: a file's certificates or the system's."""
    parts = urlsplit(base_url)
    is_tls = parts.scheme == "https"
    tls = None
    try:
        if is_tls or ca_file is not None:
            tls = ssl.create_default_context(cafile=ca_file)
            tls.set_alpn_protocols(["http/1.1"])
    except OSError as error:
        reason = error.strerror or "it holds no certificate"
        raise ConfigurationError(f"ca_file {ca_file} cannot be used: {reason}") from error
    return http_pool.Origin(
        parts.hostname or "", parts.port or (443 if is_tls else 80), tls if is_tls else None
    )


def _host(origin: http_pool.Origin) -> str:
    """The `host` header: a name as DNS has it, an IPv6 address in brackets, no usual port."""
    if ":" in origin.host:
        name = f"[{origin.host.partition('%')[0]}]"
    else:
        try:
            name = origin.host if origin.host.isascii() else origin.host.encode("idna").decode()
        except UnicodeError:
            raise ConfigurationError("The host of the upstream URL is no name.") from None
    return name if origin.port == (443 if origin.tls else 80) else f"{name}:{origin.port}"


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


_ERRORS: dict[type[http1.HttpError], tuple[type[UpstreamError], str]] = {
    http1.ConnectOverdue: (
        UpstreamUnreachable,
        "No connection to the upstream within the connect deadline. Check that it runs.",
    ),
    http1.NotConnected: (
        UpstreamUnreachable,
        "No connection to the upstream. Check that it runs, and that its URL is right.",
    ),
    http1.Overdue: (UpstreamTimeout, "The upstream did not answer in time."),
    http1.Disconnected: (
        UpstreamError,
        "The upstream closed the connection before it had answered.",
    ),
    http1.ConnectionFailed: (UpstreamError, "The connection to the upstream failed."),
    http1.BrokenOff: (UpstreamMalformed, "The upstream's answer broke off before its end."),
    http1.Malformed: (UpstreamMalformed, "The upstream's answer is not valid HTTP."),
}


def _ours(error: http1.HttpError) -> UpstreamError:
    """The error of ours for one of the client's. Its message names the kind, and quotes nothing."""
    ours, sentence = _ERRORS[type(error)]
    return ours(f"{sentence} ({error.kind})" if error.kind else sentence)


def _late(name: str, seconds: float) -> UpstreamTimeout:
    return UpstreamTimeout(
        f"The upstream did not answer in time: its {name} deadline is {seconds:g} s."
    )


class UpstreamStream:
    """An answer whose status and headers have come, and whose body is still to be read."""

    def __init__(
        self,
        connection: http1.Connection,
        pool: http_pool.Pool,
        deadlines: Deadlines,
        max_body_bytes: int,
        started: float,
        total_due: float,
    ) -> None:
        self._connection: http1.Connection | None = connection
        self._pool = pool
        self._deadlines = deadlines
        self._max_body_bytes = max_body_bytes
        self._started = started
        self._total_due = total_due
        self._read = 0
        self._length = connection.content_length
        self.status: int = connection.status
        self.headers: Headers = tuple(connection.headers)

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
        if self._length is not None:
            self._check_size(self._length)

    async def chunks(self) -> AsyncGenerator[bytes, None]:
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
        """Gives the connection back if the answer has come to its end, and closes it if not."""
        if self._connection is not None:
            self._pool.give_back(self._connection)
            self._connection = None

    async def _next(self) -> bytes:
        """The next piece; empty at the end."""
        connection, limits = self._connection, self._deadlines
        if connection is None:
            return b""
        idle_due = self._pool.time() + limits.idle
        try:
            chunk = await connection.read(min(idle_due, self._total_due))
        except http1.Overdue:
            if self._total_due < idle_due:
                raise _late("total", limits.total) from None
            raise _late("idle", limits.idle) from None
        except http1.HttpError as error:
            raise _ours(error) from None
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
    nothing of an answer has been passed on, and a generation changes nothing at the upstream, so
    that at worst one is computed twice.
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
        base_url = parse_base_url(base_url)
        self._deadlines = deadlines
        self._max_body_bytes = max_body_bytes
        self._authorization = f"Bearer {api_key}" if api_key is not None else None
        if api_key is not None and not (api_key.isascii() and api_key.isprintable()):
            raise ConfigurationError("The upstream's key may hold printable ASCII only.")
        self._origin = _origin(base_url, ca_file)
        self._host = _host(self._origin)
        self._prefix = urlsplit(base_url).path
        self._pool: http_pool.Pool | None = None

    async def open(self) -> None:
        """Makes the pool; connections are made when they are needed."""
        self._pool = http_pool.Pool(self._origin)

    async def close(self) -> None:
        """Closes every connection, those in use too."""
        if self._pool is not None:
            pool, self._pool = self._pool, None
            await pool.close()

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
        pool, limits = self._pool, self._deadlines
        if pool is None:
            raise RuntimeError("Upstream.open() comes before the first call.")
        # Nothing is said that the client did not say.
        sent = {**headers, "accept-encoding": "identity"}
        own = sent.pop(UPSTREAM_KEY, None)
        authorization = self._authorization if own is None else f"Bearer {own}"
        if authorization is not None:
            for name in CREDENTIALS:
                sent.pop(name, None)
            sent["authorization"] = authorization
        head = http1.request_head(method, self._prefix + path, self._host, sent, body)
        started = perf_counter()  # uvloop's own clock counts in milliseconds
        now = pool.time()
        due, total_due = now + min(limits.first_byte, limits.total), now + limits.total
        try:
            connection = await self._ask(pool, head, body, due)
        except http1.Overdue:
            if limits.total < limits.first_byte:
                raise _late("total", limits.total) from None
            raise _late("first-byte", limits.first_byte) from None
        except http1.HttpError as error:
            raise _ours(error) from None
        answer = UpstreamStream(connection, pool, limits, self._max_body_bytes, started, total_due)
        try:
            answer.check()
        except BaseException:
            answer.close()
            raise
        return answer

    async def _ask(
        self, pool: http_pool.Pool, head: bytes, body: bytes | None, due: float
    ) -> http1.Connection:
        """A connection on which the answer has begun. Raises HttpError."""
        connection = pool.kept()
        if connection is not None:
            try:
                await connection.ask(head, body, due)
            except http1.Disconnected:
                if connection.has_begun:
                    raise
            else:
                return connection
        connection = await self._connect(pool, due)
        await connection.ask(head, body, due)
        return connection

    async def _connect(self, pool: http_pool.Pool, due: float) -> http1.Connection:
        connect_due = pool.time() + self._deadlines.connect
        try:
            return await pool.connect(min(due, connect_due))
        except http1.ConnectOverdue:
            if due < connect_due:
                raise http1.Overdue from None
            raise
