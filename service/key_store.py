"""API keys in Redis, and the copy of them in memory that requests are checked against.

In Redis: ``sg1:{keys}:keys``, a hash of id → JSON, and ``sg1:{keys}:changes``, a counter that each
change raises. Each process keeps a ``FreshCopy``, so a request costs no round trip and a revocation
holds everywhere in about a second. When a key ends goes by the clock of Redis, not by those of the
replicas.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

from service.caller import Role
from service.errors import NotFound, StateUnavailable, StoreFull
from service.fresh_copy import FreshCopy
from service.keys import ApiKey, KeyFormatError, Limits, hashed, new_id, new_secret, token
from service.state import State

KEYS: Final = "sg1:{keys}:keys"
CHANGES: Final = "sg1:{keys}:changes"
MOST_KEYS: Final = 10_000
ENDED_SECONDS: Final = 90 * 86_400.0
"""A key that ended so long ago makes room when there is none."""
_TRIES: Final = 8

# KEYS: keys, changes. ARGV: id, JSON, most keys, ids to drop. 1 where it was added, 0 where the id
# is taken, -1 where there is no room.
_ADD: Final = """
for i = 4, #ARGV do redis.call('HDEL', KEYS[1], ARGV[i]) end
if redis.call('HEXISTS', KEYS[1], ARGV[1]) == 1 then return 0 end
if redis.call('HLEN', KEYS[1]) >= tonumber(ARGV[3]) then return -1 end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
redis.call('INCR', KEYS[2])
return 1
"""
# KEYS: keys, changes. ARGV: id, JSON as it was read, new JSON. 0 where somebody came between.
_REPLACE: Final = """
if redis.call('HGET', KEYS[1], ARGV[1]) ~= ARGV[2] then return 0 end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[3])
redis.call('INCR', KEYS[2])
return 1
"""
# KEYS: keys, changes. Both as they stand at one moment, and when that is.
_READ: Final = """
return {redis.call('GET', KEYS[2]) or '0', redis.call('HGETALL', KEYS[1]), redis.call('TIME')}
"""
# KEYS: changes, for a cluster: any of its servers will do.
_NOW: Final = "return redis.call('TIME')"

logger = logging.getLogger(__name__)


class KeyStore:
    """Keys of all replicas. ``start`` reads them and keeps the copy fresh; ``close`` ends that.

    Without ``start`` it serves the command line: changes work, ``find`` does not.
    """

    def __init__(
        self,
        state: State,
        refresh_seconds: float = 1.0,
        stale_seconds: float = 3600.0,
        *,
        most: int = MOST_KEYS,
    ) -> None:
        self._state = state
        self._stale_seconds = stale_seconds
        self._most = most
        self._add = state.script(_ADD)
        self._replace = state.script(_REPLACE)
        self._read = state.script(_READ)
        self._now = state.script(_NOW)
        self._ahead = time.time() - time.monotonic()
        """Redis's clock less the one that nobody sets; this machine's until Redis was asked."""
        self._copy = FreshCopy("API keys", self._counter, self._copied, refresh_seconds)
        self._unreadable: frozenset[str] = frozenset()

    async def start(self) -> None:
        """Reads the keys if Redis can be asked, and begins to refresh them."""
        await self._copy.start()

    async def close(self) -> None:
        """Refreshes no longer."""
        await self._copy.close()

    @property
    def age_seconds(self) -> float:
        """Since Redis last confirmed the copy; infinite where there is none."""
        return self._copy.age_seconds

    def now(self) -> float:
        """Seconds since 1970 by the clock of Redis as last known, whatever this machine's says."""
        return time.monotonic() + self._ahead

    async def server_time(self) -> float:
        """The same, asked for. Raises ``StateUnavailable``."""
        async with self._state.connected() as redis:
            self._set_clock(await self._now([CHANGES], client=redis))
        return self.now()

    def find(self, identity: str) -> ApiKey | None:
        """The key of this id, as last known.

        Raises ``StateUnavailable`` where no keys were ever read, or none confirmed for
        ``stale_seconds``: a key may have been revoked since.
        """
        keys = self._copy.value
        if keys is None or self.age_seconds > self._stale_seconds:
            raise StateUnavailable(
                "API keys cannot be checked, because Redis cannot be reached: try again later"
            )
        return keys.get(identity)

    async def create(
        self,
        name: str,
        roles: frozenset[Role],
        *,
        expires: float | None = None,
        policy: str | None = None,
        upstream_key: str | None = None,
        routes: tuple[str, ...] | None = None,
        limits: Limits | None = None,
    ) -> tuple[ApiKey, str]:
        """A new key and its token, which is shown here and never again.

        Raises ``KeyFormatError``, ``StoreFull`` and ``StateUnavailable``.
        """
        created = await self.server_time()
        for _ in range(_TRIES):
            secret = new_secret()
            key = ApiKey(
                id=new_id(),
                name=name,
                roles=roles,
                created=created,
                digest=hashed(secret),
                expires=expires,
                policy=policy,
                upstream_key=upstream_key,
                routes=routes,
                limits=limits or {},
            )
            added = await self._added(key)
            if added < 0:
                added = await self._added(key, await self._long_ended())
            if added < 0:
                raise StoreFull(f"{self._most} keys are kept already, and none ended long ago")
            if added:
                await self._changed()
                return key, token(key.id, secret)
        raise StateUnavailable("no free id for a key was found: try again")

    async def listed(self) -> list[ApiKey]:
        """All keys by age, the revoked and expired too. Raises ``StateUnavailable``."""
        _, keys, _ = await self._everything()
        return sorted(keys.values(), key=lambda key: (key.created, key.id))

    async def revoke(self, identity: str) -> ApiKey:
        """Ends a key for good; one that has ended stays as it is. Raises ``NotFound``, and
        ``KeyFormatError`` where the key cannot be read here.
        """
        now = await self.server_time()

        def revoked(value: dict[str, Any]) -> None:
            value["revoked"] = value.get("revoked") or now

        return await self._change(identity, revoked)

    async def rotate(self, identity: str, keep_seconds: float = 0.0) -> tuple[ApiKey, str]:
        """A new secret for a key; the old one holds for ``keep_seconds`` more.

        Raises ``NotFound``, also where the key was revoked, and ``KeyFormatError``.
        """
        secret = new_secret()
        now = await self.server_time()

        def rotated(value: dict[str, Any]) -> None:
            if value.get("revoked") is not None:
                raise NotFound(f"the key {identity} was revoked: make another", code="key_revoked")
            value["previous"], value["digest"] = value["digest"], hashed(secret)
            value["previous_until"] = now + keep_seconds

        return await self._change(identity, rotated), token(identity, secret)

    async def refresh(self) -> None:
        """Brings the copy up to date. Raises ``StateUnavailable``."""
        await self._copy.refresh()

    async def _counter(self) -> bytes:
        async with self._state.connected() as redis:
            found: Any = await redis.get(CHANGES)
        return found or b"0"

    async def _copied(self) -> tuple[bytes, Mapping[str, ApiKey]]:
        changes, keys, unreadable = await self._everything()
        # Once each, not every minute.
        for identity in sorted(unreadable - self._unreadable):
            logger.error("the API key %s cannot be read here, and is refused", identity)
        self._unreadable = unreadable
        return changes, MappingProxyType(keys)

    async def _added(self, key: ApiKey, dropped: tuple[str, ...] = ()) -> int:
        arguments: list[str | int] = [key.id, key.to_json(), self._most, *dropped]
        async with self._state.connected() as redis:
            return int(await self._add([KEYS, CHANGES], arguments, client=redis))

    async def _long_ended(self) -> tuple[str, ...]:
        _, keys, _ = await self._everything()
        oldest = self.now() - ENDED_SECONDS
        ends = ((key.id, key.revoked or key.expires) for key in keys.values())
        return tuple(identity for identity, end in ends if end is not None and end < oldest)[:1000]

    async def _everything(self) -> tuple[bytes, dict[str, ApiKey], frozenset[str]]:
        """The counter, the keys by id, and the ids of those that cannot be read."""
        async with self._state.connected() as redis:
            changes, flat, now = await self._read([KEYS, CHANGES], client=redis)
        self._set_clock(now)
        keys: dict[str, ApiKey] = {}
        unreadable = set()
        key: ApiKey | None
        for identity, data in zip(flat[::2], flat[1::2], strict=True):
            name = identity.decode(errors="replace")
            try:
                key = ApiKey.from_json(data)
            except KeyFormatError:
                key = None
            if key is not None and key.id == name:
                keys[name] = key
            else:
                unreadable.add(name)
        return changes, keys, frozenset(unreadable)

    def _set_clock(self, told: Sequence[bytes]) -> None:
        seconds, microseconds = map(int, told)
        self._ahead = seconds + microseconds / 1e6 - time.monotonic()

    async def _change(self, identity: str, change: Callable[[dict[str, Any]], None]) -> ApiKey:
        """Changes a key's JSON in place, so that what a later release put there stays."""
        for _ in range(_TRIES):
            async with self._state.connected() as redis:
                before = await redis.hget(KEYS, identity)
            if before is None:
                raise NotFound(f"there is no key {identity}", code="key_not_found")
            # What cannot be read here is not changed here, nor said to be.
            ApiKey.from_json(before)
            value = json.loads(before)
            change(value)
            after = json.dumps(value, separators=(",", ":"))
            async with self._state.connected() as redis:
                arguments: list[str | bytes] = [identity, before, after]
                done = await self._replace([KEYS, CHANGES], arguments, client=redis)
            if done:
                await self._changed()
                return ApiKey.from_json(after)
        raise StateUnavailable("the key is being changed by others: try again")

    async def _changed(self) -> None:
        """Who changed a key here sees it here at once."""
        if self._copy.is_kept_fresh:
            await self._copy.try_refresh()
