"""From a URL to a client of Redis: one server, a service behind Sentinel, or a cluster.

    redis://[user:password@]host[:port][/database]
    unix:///path
    redis+sentinel://[user:password@]host[:port][,…]/service[/database]
    redis+cluster://[user:password@]host[:port][,…]

With ``rediss`` for ``redis`` it is TLS. Options of redis-py follow as a query, such as
``?ssl_ca_certs=/path``. The user and password are those of the data servers; Sentinels are told
``sentinel_username`` and ``sentinel_password``.

What goes on by itself: behind Sentinel a new connection asks who the primary is, and a connection
to a primary that was demoted is dropped. A cluster's client follows MOVED and ASK.

What works in a cluster as elsewhere: single commands; scripts and ``pipeline(transaction=True)``
whose keys share a hash tag; ``pipeline(transaction=False)`` over any keys. What does not: MGET or
a script over keys of several slots, a script inside a pipeline, a client with a connection of its
own, databases other than 0.
"""

from __future__ import annotations

import re
import ssl
from collections.abc import Iterable, Sequence
from typing import Any, Final, cast
from urllib.parse import SplitResult, urlsplit

from redis.asyncio import BlockingConnectionPool, Redis, RedisCluster, Sentinel, SSLConnection
from redis.asyncio.cluster import ClusterNode
from redis.asyncio.connection import parse_url
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import (
    MasterNotFoundError,
    SentinelConnectionPool,
    SentinelManagedConnection,
    SentinelManagedSSLConnection,
)
from redis.backoff import NoBackoff
from redis.exceptions import (
    AuthenticationError,
    AuthenticationWrongNumberOfArgsError,
    NoPermissionError,
    RedisClusterException,
    RedisError,
    ResponseError,
    TimeoutError,
)
from redis.exceptions import ConnectionError as LostConnection

FAILURES: Final = (RedisError, RedisClusterException, OSError)
"""All that a client raises; the cluster's own class is no ``RedisError``."""

_HOWTO: Final = (
    "write redis://[user:password@]host[:port][/database], rediss://… for TLS, unix:///path,"
    " redis+sentinel://[user:password@]host[:port][,…]/service[/database] or"
    " redis+cluster://[user:password@]host[:port][,…], with special characters percent-encoded"
)
_SENTINEL_PORT: Final = 26379
_PORT: Final = 6379
_PASSED_ON: Final = ("ssl", "sentinel_")
"""How options begin that Sentinels are told too."""


def client_for(url: str, *, connections: int, connect_seconds: float) -> Redis:
    """A client that opens at most ``connections`` to a server, each within ``connect_seconds``.

    The client of a cluster is declared as the ``Redis`` that it resembles. Nothing is connected
    yet. Raises ``ValueError``, which says how to write ``url`` and not what it holds.
    """
    try:
        parts = urlsplit(url)
        kind = parts.scheme.rpartition("+")[2]
        if kind == "sentinel":
            return _behind_sentinel(parts, connections, connect_seconds)
        if kind == "cluster":
            return _cluster(parts, connections, connect_seconds)
        return _server(url, parts, connections, connect_seconds)
    except (ValueError, TypeError, *FAILURES):
        raise ValueError(f"cannot be read: {_HOWTO}") from None


def is_cluster(client: Redis) -> bool:
    """Whether ``client`` is that of a cluster."""
    return isinstance(cast(object, client), RedisCluster)


def writable_nodes(client: Redis) -> Sequence[dict[str, Any]]:
    """For each server that takes writes, what a command is given to go there.

    A cluster's are known once it has answered.
    """
    if isinstance(cluster := cast(object, client), RedisCluster):
        return [{"target_nodes": node} for node in cluster.get_primaries()]
    return [{}]


def masked(url: str) -> str:
    """``url`` without its password and options, for logs."""
    return re.sub(r"^([^:]+://[^:@/]*):.*@", r"\1:***@", url.split("?", 1)[0])


def for_good(error: BaseException | None) -> str | None:
    """Why waiting will not mend ``error``; None where it may.

    redis-py wraps what the server said at login and what TLS found, hence the walk.
    """
    while error is not None:
        if isinstance(error, AuthenticationError | AuthenticationWrongNumberOfArgsError):
            return f"the server refused the user or password ({error}): correct them"
        if isinstance(error, NoPermissionError):
            return f"the server forbids a command that is needed ({error}): grant it"
        if isinstance(error, ssl.SSLCertVerificationError):
            return (
                f"the server's certificate is not trusted ({error.verify_message}): name its"
                " authority with ?ssl_ca_certs=/path"
            )
        # The plain class: its subclasses are moods of the server, such as a cluster in repair.
        if type(error) is ResponseError:
            return f"the server refused the connection ({error}): correct the URL"
        error = error.__cause__ or error.__context__
    return None


def _behaviour(connect_seconds: float) -> dict[str, Any]:
    return {
        "socket_connect_timeout": connect_seconds,
        # Commands have their deadline in `State.connected`. The library's own makes a task of
        # every send, and on Python 3.11 loses cancellations on the way (asyncio.wait_for).
        "socket_timeout": None,
        # RESP2 saves a handshake, and works through proxies that know no other.
        "protocol": 2,
        # One try: the caller has somewhere else to go, and waits while we try again.
        "retry": Retry(NoBackoff(), 0),
    }


def _server(url: str, parts: SplitResult, connections: int, connect_seconds: float) -> Redis:
    place = parts.path if parts.scheme == "unix" else parts.hostname
    # redis-py takes a database that is not a number for database 0.
    if not place or (parts.scheme != "unix" and not re.fullmatch(r"(/\d*)?", parts.path)):
        raise ValueError("no host, path or database number")
    pool = BlockingConnectionPool.from_url(
        url,
        max_connections=connections,
        timeout=connect_seconds,
        **_behaviour(connect_seconds),
    )
    # Options that no connection has come to light only when one is made.
    pool.connection_class(**pool.connection_kwargs)
    return Redis.from_pool(pool)


def _behind_sentinel(parts: SplitResult, connections: int, connect_seconds: float) -> Redis:
    named = re.fullmatch(r"/([^/]+)(?:/(\d*))?", parts.path)
    if named is None:
        raise ValueError("no service, or no database number")
    options = _options(parts, "sentinel", database=named[2] or "")
    sentinel_options = {
        key.removeprefix("sentinel_"): options.pop(key) if key.startswith("sentinel_") else value
        for key, value in list(options.items())
        if key.startswith(_PASSED_ON)
    }
    sentinels = _Sentinels(  # type: ignore[no-untyped-call]
        _addresses(parts, _SENTINEL_PORT),
        # Its own deadline, so that one that hangs leaves time to ask the next.
        sentinel_kwargs={
            **_behaviour(connect_seconds),
            "socket_timeout": connect_seconds,
            **sentinel_options,
        },
    )
    pool = _SentinelPool(  # type: ignore[no-untyped-call]
        named[1],
        sentinels,
        connection_class=_SecureToPrimary if options.get("ssl") else _ToPrimary,
        **{
            "max_connections": connections,
            "timeout": connect_seconds,
            **_behaviour(connect_seconds),
            **options,
        },
    )
    pool.connection_class(**pool.connection_kwargs)
    return Redis.from_pool(pool)


def _cluster(parts: SplitResult, connections: int, connect_seconds: float) -> Redis:
    if parts.path not in ("", "/", "/0"):
        raise ValueError("a cluster has database 0 only")
    cluster = RedisCluster(
        startup_nodes=[ClusterNode(host, port) for host, port in _addresses(parts, _PORT)],
        # Names in the URL outlive the addresses that nodes have today.
        dynamic_startup_nodes=False,
        **{
            # One more than may be asked for at once: the probe's.
            "max_connections": connections + 1,
            **_behaviour(connect_seconds),
            # For a cluster a retry is what asks anew where slots lie after a node has failed.
            "retry": Retry(NoBackoff(), 2),
            **_options(parts, "cluster"),
        },
    )
    return cast(Redis, cluster)


def _options(parts: SplitResult, kind: str, database: str = "") -> dict[str, Any]:
    """What a URL with several hosts says beside them, read as redis-py reads its own."""
    scheme = parts.scheme.removesuffix(f"+{kind}")
    if scheme not in ("redis", "rediss"):
        raise ValueError("no such scheme")
    credentials, at, _ = parts.netloc.rpartition("@")
    found = dict(parse_url(f"{scheme}://{credentials}{at}host/{database}?{parts.query}"))
    del found["host"]
    if found.pop("connection_class", None) is SSLConnection:
        found["ssl"] = True
    return found


def _addresses(parts: SplitResult, port: int) -> list[tuple[str, int]]:
    addresses = []
    for address in parts.netloc.rpartition("@")[2].split(","):
        one = urlsplit(f"//{address}")
        if not one.hostname:
            raise ValueError("no host")
        addresses.append((one.hostname, one.port or port))
    return addresses


class _Sentinels(Sentinel):
    """Tells a wrong password and a wrong name from a primary that is only away."""

    async def discover_master(self, service_name: str) -> tuple[str, int]:
        """The primary's address. Raises what keeps it from being known."""
        refusal: LostConnection | None = None
        has_answered = is_known = False
        for number, sentinel in enumerate(self.sentinels):
            try:
                services: Any = await sentinel.sentinel_masters()
            except AuthenticationError as error:
                refusal = error
                continue
            except (LostConnection, TimeoutError):
                continue
            has_answered = True
            service = services.get(service_name)
            is_known = is_known or service is not None
            if service and self.check_master_state(service, service_name):
                # The one that knew is asked first from now on.
                first = self.sentinels
                first[0], first[number] = first[number], first[0]
                return service["ip"], service["port"]
        if has_answered and not is_known:
            raise ResponseError(f"the Sentinels know no service {service_name!r}")
        if refusal is not None and not has_answered:
            raise refusal
        raise MasterNotFoundError(
            f"the Sentinels know of no primary of {service_name!r} that is up"
            if has_answered
            else "no Sentinel answered"
        )


class _ToPrimary(SentinelManagedConnection):
    """Asks who the primary is whenever it connects, also in the middle of a client's use."""

    async def send_packed_command(
        self, command: bytes | str | Iterable[bytes], check_health: bool = True
    ) -> None:
        """Sends a command, packed as the protocol has it."""
        # The library's own goes back to the address of before, which only the pool asks anew.
        if not self.is_connected:
            await self.connect()  # type: ignore[no-untyped-call]
        await super().send_packed_command(command, check_health)


class _SecureToPrimary(_ToPrimary, SentinelManagedSSLConnection):
    """The same, over TLS."""


class _SentinelPool(SentinelConnectionPool, BlockingConnectionPool):
    """A pool for the primary where who finds no free connection waits for one."""

    async def disconnect(self, inuse_connections: bool = True) -> None:
        """Closes connections, with all of them those to the Sentinels."""
        await super().disconnect(inuse_connections)
        if inuse_connections:
            await self.sentinel_manager.aclose()
