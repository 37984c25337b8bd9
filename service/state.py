"""State in Redis through redis-py: the one border where its errors become ours.

A server that cannot be reached does not stop the service: ``available`` says so, callers do
without, and a background task tries again. What can never work fails at start instead: a URL that
cannot be read, a password that is refused, a server that may evict.

Keys are ``sg1:<kind>:…``. A kind whose keys one script touches together is written in braces,
``sg1:{records}:…``, which keeps them on one node of a cluster.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.commands.core import AsyncScript
from redis.exceptions import (
    AuthenticationError,
    AuthenticationWrongNumberOfArgsError,
    NoPermissionError,
    RedisError,
    ResponseError,
)

from service.errors import ConfigurationError, StateUnavailable
from service.private_valkey import PrivateValkey

PRIVATE_MEMORY_BYTES: Final = 256 * 2**20

logger = logging.getLogger(__name__)


class State:
    """A bounded pool of connections, and whether the server behind it can be used now."""

    def __init__(
        self,
        client: Redis,
        place: str,
        private: PrivateValkey | None,
        command_seconds: float,
        probe_seconds: float,
    ) -> None:
        self._client = client
        self._place = place
        self._private = private
        self._command_seconds = command_seconds
        self._probe_seconds = probe_seconds
        self._usable = asyncio.Event()
        self._dedicated: list[Redis] = []
        self._watcher: asyncio.Task[None] | None = None
        self.problem: str | None = None
        """Why state is unavailable, in a sentence for operators; None while it is available."""

    @classmethod
    async def open(
        cls,
        url: str | None,
        *,
        data_directory: Path,
        memory_bytes: int = PRIVATE_MEMORY_BYTES,
        connections: int = 16,
        connect_seconds: float = 1.0,
        command_seconds: float = 2.0,
        probe_seconds: float = 1.0,
    ) -> State:
        """Connects to ``url``; None means a private Valkey in ``data_directory``.

        A connection opens, or comes free, within ``connect_seconds``; whatever is done inside
        ``connected`` ends within ``command_seconds``. A lost server is tried again every
        ``probe_seconds``. Raises ``ConfigurationError`` for what waiting will not mend.
        """
        private, place = None, "the private Valkey" if url is None else _masked(url)
        async with contextlib.AsyncExitStack() as undo:
            if url is None:
                private = PrivateValkey(data_directory / "valkey", memory_bytes)
                undo.push_async_callback(private.stop)
                url = await private.start()
            client = Redis.from_pool(_pool(url, connections, connect_seconds))
            undo.push_async_callback(client.aclose)
            state = cls(client, place, private, command_seconds, probe_seconds)
            try:
                await state._examine()
            except (RedisError, OSError) as error:
                state._lost(_reason(error))
            undo.pop_all()
        state._watcher = asyncio.create_task(state._watch())
        return state

    @property
    def available(self) -> bool:
        """Whether the last command or probe reached a server that can be used."""
        return self._usable.is_set()

    async def wait_available(self) -> None:
        """Returns when state is available; has no deadline of its own."""
        await self._usable.wait()

    def dedicated(self) -> Redis:
        """A client with a connection of its own, to be used inside ``connected``: for who asks
        often, since taking a connection from the pool costs more than using it.
        """
        client = self._client.client()
        self._dedicated.append(client)
        return client

    @contextlib.asynccontextmanager
    async def connected(self) -> AsyncIterator[Redis]:
        """The client. What fails inside, or takes too long, raises ``StateUnavailable``.

        Raises it at once while state is unavailable, so that nobody waits for a dead server.
        """
        if not self.available:
            raise StateUnavailable(f"state is unavailable: {self.problem}")
        try:
            async with asyncio.timeout(self._command_seconds):
                yield self._client
        except ResponseError as error:
            # It answers, but not with a yes: full, read-only, forbidden.
            raise StateUnavailable(f"{self._place} refused a command: {error}") from error
        except (RedisError, OSError) as error:
            self._lost(_reason(error))
            raise StateUnavailable(f"state is unavailable: {self.problem}") from error

    def script(self, text: str) -> AsyncScript:
        """A Lua script that is sent once and called by its hash, inside ``connected``."""
        return self._client.register_script(text)

    async def close(self) -> None:
        """Ends the probe, the connections and a private Valkey."""
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.gather(self._watcher, return_exceptions=True)
        self._usable.clear()
        self.problem = "the service is stopping"
        for client in (*self._dedicated, self._client):
            with contextlib.suppress(RedisError, OSError):
                await client.aclose()
        if self._private is not None:
            await self._private.stop()

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._probe_seconds)
            try:
                if self._private is not None:
                    await self._private.start()
                await self._examine()
            # Whatever it was, it is tried again: nothing else brings state back.
            except Exception as error:
                self._lost(_reason(error))

    async def _examine(self) -> None:
        """One probe. On the way up it also asks whether the server is one that may be used."""
        try:
            async with asyncio.timeout(self._command_seconds):
                await self._client.ping()
                if self.available:
                    return
                await self._refuse_eviction()
        except RedisError as error:
            if reason := _for_good(error):
                raise ConfigurationError(f"state_url {self._place}: {reason}") from error
            raise
        if self.problem is not None:
            logger.warning("%s is available again", self._place)
        self.problem = None
        self._usable.set()

    async def _refuse_eviction(self) -> None:
        """Raises ``ConfigurationError`` where the server throws keys away when it is full.

        ``volatile-*`` policies count too: they throw away what has an expiry. Without a memory
        limit no policy ever acts, so that is accepted.
        """
        settings: Mapping[str, Any] = {}
        with contextlib.suppress(ResponseError):
            settings = await self._client.info("memory")
        if "maxmemory_policy" not in settings:
            # An access list may forbid the one, and hosted servers often lack the other.
            with contextlib.suppress(ResponseError):
                answer: dict[Any, Any] = await self._client.config_get("maxmemory*")
                settings = {str(key).replace("-", "_"): value for key, value in answer.items()}
        policy, limit = settings.get("maxmemory_policy"), settings.get("maxmemory")
        if policy is None:
            logger.warning("%s does not say whether it evicts: see that it does not", self._place)
        elif policy != "noeviction" and str(limit) != "0":
            raise ConfigurationError(
                f"state_url {self._place}: its maxmemory-policy is {policy}, so it would throw"
                " records away: set noeviction there, or use another server"
            )

    def _lost(self, reason: str) -> None:
        if self.problem is None:
            logger.error("%s is unavailable, going on without it: %s", self._place, reason)
        self.problem = reason
        self._usable.clear()


def _pool(url: str, connections: int, connect_seconds: float) -> BlockingConnectionPool:
    try:
        parts = urlsplit(url)
        place = parts.path if parts.scheme == "unix" else parts.hostname
        # redis-py takes a database that is not a number for database 0.
        if not place or (parts.scheme != "unix" and not re.fullmatch(r"(/\d*)?", parts.path)):
            raise ValueError("no host, path or database number")
        pool = BlockingConnectionPool.from_url(
            url,
            max_connections=connections,
            timeout=connect_seconds,
            socket_connect_timeout=connect_seconds,
            # Commands have their deadline in `connected`. The library's own makes a task of every
            # send, and on Python 3.11 loses cancellations on the way (asyncio.wait_for).
            socket_timeout=None,
            # RESP2 saves a handshake, and works through proxies that know no other.
            protocol=2,
            # One try: the caller has somewhere else to go, and waits while we try again.
            retry=Retry(NoBackoff(), 0),
        )
        # Options that no connection has come to light only when one is made.
        pool.connection_class(**pool.connection_kwargs)
    except (ValueError, TypeError, RedisError):
        raise ConfigurationError(
            "state_url cannot be read: write redis://[user:password@]host[:port][/database],"
            " rediss://… for TLS, or unix:///path, with special characters percent-encoded"
        ) from None
    return pool


def _for_good(error: BaseException | None) -> str | None:
    """Why waiting will not mend ``error``; None where it may.

    On a unix socket redis-py wraps what the server said at login, hence the walk.
    """
    while error is not None:
        if isinstance(error, AuthenticationError | AuthenticationWrongNumberOfArgsError):
            return f"the server refused the user or password ({error}): correct them"
        if isinstance(error, NoPermissionError):
            return f"the server forbids a command that is needed ({error}): grant it"
        # The plain class: its subclasses are moods of the server, such as a cluster in repair.
        if type(error) is ResponseError:
            return f"the server refused the connection ({error}): correct the URL"
        error = error.__cause__
    return None


def _reason(error: Exception) -> str:
    """What ``error`` says; a deadline says nothing by itself."""
    return str(error) or "it did not answer in time"


def _masked(url: str) -> str:
    """``url`` without its password and options, for logs."""
    return re.sub(r"^([^:]+://[^:@/]*):.*@", r"\1:***@", url.split("?", 1)[0])
