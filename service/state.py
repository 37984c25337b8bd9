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
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any, Final

from redis.asyncio import Redis, RedisCluster
from redis.commands.core import AsyncScript
from redis.exceptions import ReadOnlyError, ResponseError

from service.errors import ConfigurationError, StateUnavailable
from service.private_valkey import PrivateValkey
from service.state_client import (
    FAILURES,
    client_for,
    for_good,
    is_cluster,
    masked,
    writable_nodes,
)

PRIVATE_MEMORY_BYTES: Final = 256 * 2**20

logger = logging.getLogger(__name__)


class State:
    """A bounded pool of connections, and whether the server behind it can be used now."""

    def __init__(
        self,
        client: Redis,
        place: str,
        private: PrivateValkey | None,
        *,
        setting: str,
        may_evict: bool,
        connections: int,
        command_seconds: float,
        probe_seconds: float,
    ) -> None:
        self._client = client
        self._place = place
        self._private = private
        self._setting = setting
        self._may_evict = may_evict
        # A cluster's client refuses, at once, who finds no free connection: here they wait.
        self._turns = asyncio.Semaphore(connections) if is_cluster(client) else None
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
        setting: str = "state_url",
        may_evict: bool = False,
        memory_bytes: int = PRIVATE_MEMORY_BYTES,
        connections: int = 16,
        connect_seconds: float = 1.0,
        command_seconds: float = 2.0,
        probe_seconds: float = 1.0,
    ) -> State:
        """Connects to ``url``; None means a private Valkey in ``data_directory``.

        ``setting`` is what messages call the URL. Only what ``may_evict`` accepts a server that
        throws keys away when it is full.

        A connection opens, or comes free, within ``connect_seconds``; whatever is done inside
        ``connected`` ends within ``command_seconds``. A lost server is tried again every
        ``probe_seconds``. Raises ``ConfigurationError`` for what waiting will not mend.
        """
        private, place = None, "the private Valkey" if url is None else masked(url)
        async with contextlib.AsyncExitStack() as undo:
            if url is None:
                private = PrivateValkey(data_directory / "valkey", memory_bytes)
                undo.push_async_callback(private.stop)
                url = await private.start()
            try:
                client = client_for(url, connections=connections, connect_seconds=connect_seconds)
            except ValueError as error:
                raise ConfigurationError(f"{setting} {error}") from None
            undo.push_async_callback(client.aclose)
            state = cls(
                client,
                place,
                private,
                setting=setting,
                may_evict=may_evict,
                connections=connections,
                command_seconds=command_seconds,
                probe_seconds=probe_seconds,
            )
            try:
                await state._examine()
            except FAILURES as error:
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
        often, since taking a connection from the pool costs more than using it. For a cluster,
        whose keys lie on several servers, it is the common client.
        """
        if self._turns is not None:
            return self._client
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
            async with (
                asyncio.timeout(self._command_seconds),
                self._turns or contextlib.nullcontext(),
            ):
                yield self._client
        except ReadOnlyError as error:
            # The server was demoted: the name in the URL may lead to another by now.
            await self._reconnect()
            raise StateUnavailable(f"{self._place} takes no writes: {error}") from error
        except ResponseError as error:
            # It answers, but not with a yes: full, read-only, forbidden.
            raise StateUnavailable(f"{self._place} refused a command: {error}") from error
        except FAILURES as error:
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
            with contextlib.suppress(*FAILURES):
                await client.aclose()
        if self._private is not None:
            await self._private.stop()

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._probe_seconds)
            try:
                if self._private is not None:
                    await self._private.start()
                if self._turns is not None and not self.available:
                    await self._forget_layout()
                await self._examine()
            # Whatever it was, it is tried again: nothing else brings state back.
            except Exception as error:
                self._lost(_reason(error))

    async def _examine(self) -> None:
        """One probe. On the way up it also asks whether the server is one that may be used."""
        try:
            async with asyncio.timeout(self._command_seconds):
                if self._turns is None:
                    await self._client.ping()
                else:
                    await self._client.ping(target_nodes=RedisCluster.PRIMARIES)
                if self.available:
                    return
                if not self._may_evict:
                    for node in writable_nodes(self._client):
                        await self._refuse_eviction(node)
        except FAILURES as error:
            if reason := for_good(error):
                raise ConfigurationError(f"{self._setting} {self._place}: {reason}") from error
            raise
        if self.problem is not None:
            # Connections from before would fail whoever uses them first.
            await self._reconnect()
            logger.warning("%s is available again", self._place)
        self.problem = None
        self._usable.set()

    async def _refuse_eviction(self, node: Mapping[str, Any]) -> None:
        """Raises ``ConfigurationError`` where ``node`` throws keys away when it is full.

        ``volatile-*`` policies count too: they throw away what has an expiry. Without a memory
        limit no policy ever acts, so that is accepted.
        """
        settings: Mapping[str, Any] = {}
        with contextlib.suppress(ResponseError):
            settings = await self._client.info("memory", **node)
        if "maxmemory_policy" not in settings:
            # An access list may forbid the one, and hosted servers often lack the other.
            with contextlib.suppress(ResponseError):
                answer: dict[Any, Any] = await self._client.config_get("maxmemory*", **node)
                settings = {str(key).replace("-", "_"): value for key, value in answer.items()}
        policy, limit = settings.get("maxmemory_policy"), settings.get("maxmemory")
        if policy is None:
            logger.warning("%s does not say whether it evicts: see that it does not", self._place)
        elif policy != "noeviction" and str(limit) != "0":
            raise ConfigurationError(
                f"{self._setting} {self._place}: its maxmemory-policy is {policy}, so it would"
                " throw records away: set noeviction there, or use another server"
            )

    async def _reconnect(self) -> None:
        """Drops idle connections and those of dedicated clients; the next use opens anew."""
        with contextlib.suppress(*FAILURES):
            for client in self._dedicated:
                if client.connection is not None:
                    await client.connection.disconnect(nowait=True)
            if self._turns is None:
                await self._client.connection_pool.disconnect(inuse_connections=False)

    async def _forget_layout(self) -> None:
        """Has a cluster's client ask anew where slots lie. By itself it does that after errors
        alone, and a node that hangs makes none, though another may have taken its place.
        """
        with contextlib.suppress(*FAILURES):
            await self._client.aclose()

    def _lost(self, reason: str) -> None:
        if self.problem is None:
            logger.error("%s is unavailable, going on without it: %s", self._place, reason)
        self.problem = reason
        self._usable.clear()


def _reason(error: Exception) -> str:
    """What ``error`` says; a deadline says nothing by itself."""
    return str(error) or "it did not answer in time"
