"""The second tier of the verdict cache, in Redis: what one replica judged, the others know.

It may only save work. Whatever goes wrong, and whatever takes too long, is a miss; after a failure
it is left alone for a while, so that a dead cache costs nothing. Keys are
``sg1:verdict:<hex of the keyed hash>`` and expire. Whoever may write to this Redis may change
verdicts: it is to be protected like the one that holds the keys.
"""

from __future__ import annotations

import asyncio
import math
import struct
from collections import OrderedDict
from collections.abc import Awaitable, Iterable, Sequence
from typing import Final, cast

from redis.asyncio import Redis

from models.taxonomy import CATEGORIES, ROLES, SIGNALS
from models.verdict import Coverage, Verdict
from service.errors import StateUnavailable
from service.state import State
from service.state_client import is_cluster

# Version, role, number of categories and of signals; then the scores, all as they were computed,
# since a rounded one may cross the operating point; then coverage.
_VERSION: Final = 1
_HEAD: Final = struct.Struct("<BBBB")
_BODY: Final = struct.Struct(f"<{3 + len(CATEGORIES) + len(SIGNALS)}d3Q")
_SHAPE: Final = (len(CATEGORIES), len(SIGNALS))
_AT_ONCE: Final = 128
"""Verdicts in one message to Redis."""


def encode(verdict: Verdict) -> bytes:
    """``verdict`` in 236 bytes, exactly."""
    coverage = verdict.coverage
    return _HEAD.pack(_VERSION, ROLES.index(verdict.role), *_SHAPE) + _BODY.pack(
        *verdict.at_least,
        *verdict.category_scores,
        *verdict.signal_scores,
        coverage.characters_judged,
        coverage.characters_total,
        coverage.windows,
    )


def decode(data: bytes) -> Verdict | None:
    """What was encoded; None for what another version wrote, or nobody."""
    if len(data) != _HEAD.size + _BODY.size:
        return None
    version, role, *shape = _HEAD.unpack_from(data)
    if version != _VERSION or tuple(shape) != _SHAPE or role >= len(ROLES):
        return None
    *scores, judged, total, windows = _BODY.unpack_from(data, _HEAD.size)
    if not all(0.0 <= score <= 1.0 for score in scores):
        return None
    return Verdict(
        ROLES[role],
        (scores[0], scores[1], scores[2]),
        tuple(scores[3 : 3 + len(CATEGORIES)]),
        tuple(scores[3 + len(CATEGORIES) :]),
        Coverage(judged, total, windows),
    )


class SharedVerdicts:
    """Verdicts of all replicas, each kept for ``seconds``.

    A look-up takes at most ``most_seconds_of_wait``, and after one that failed none is made for
    ``quiet_seconds``. Verdicts are written in the background, at most ``most_waiting`` at a time;
    beyond that the oldest are dropped.
    """

    def __init__(
        self,
        state: State,
        seconds: int,
        most_seconds_of_wait: float = 0.02,
        *,
        quiet_seconds: float = 1.0,
        most_waiting: int = 1024,
    ) -> None:
        self._state = state
        self._seconds = seconds
        self._wait = most_seconds_of_wait
        self._quiet = quiet_seconds
        self._most_waiting = most_waiting
        self._quiet_until = -math.inf
        self._waiting: OrderedDict[bytes, Verdict] = OrderedDict()
        self._writer: asyncio.Task[None] | None = None
        self._reads: set[asyncio.Task[list[Verdict | None] | None]] = set()
        self.dropped = 0
        """Verdicts that were judged and not written."""

    @property
    def is_asked(self) -> bool:
        """Whether Redis is there, and has not failed just now."""
        return self._state.available and asyncio.get_running_loop().time() >= self._quiet_until

    async def get(self, digests: Sequence[bytes]) -> list[Verdict | None] | None:
        """What is known, in the order of ``digests``; None where nothing could be learnt."""
        if not digests:
            return []
        if not self.is_asked:
            return None
        read = asyncio.create_task(self._read(digests))
        self._reads.add(read)
        read.add_done_callback(self._reads.discard)
        # One that is late is not cancelled, which would close its connection: where connecting
        # takes longer than the wait, none would ever be open. `State.connected` ends it.
        await asyncio.wait([read], timeout=self._wait)
        if not read.done():
            self._leave_alone()
            return None
        return read.result()

    def put(self, pairs: Iterable[tuple[bytes, Verdict]]) -> None:
        """Has verdicts written; returns at once."""
        if not self.is_asked:
            return
        for digest, verdict in pairs:
            self._waiting[digest] = verdict
            if len(self._waiting) > self._most_waiting:
                self._waiting.popitem(last=False)
                self.dropped += 1
        if self._waiting and (self._writer is None or self._writer.done()):
            self._writer = asyncio.create_task(self._write())

    async def settled(self) -> None:
        """Returns when what was put is written or dropped."""
        if self._writer is not None:
            await asyncio.wait([self._writer])

    async def close(self) -> None:
        """Drops what is not written."""
        tasks = [*self._reads, *([self._writer] if self._writer is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _read(self, digests: Sequence[bytes]) -> list[Verdict | None] | None:
        try:
            async with self._state.connected() as redis:
                found = await _values(redis, [_key(digest) for digest in digests])
        except StateUnavailable:
            self._leave_alone()
            return None
        return [decode(data) if isinstance(data, bytes) else None for data in found]

    async def _write(self) -> None:
        while self._waiting:
            some = [
                self._waiting.popitem(last=False) for _ in range(min(_AT_ONCE, len(self._waiting)))
            ]
            try:
                async with self._state.connected() as redis:
                    pipeline = redis.pipeline(transaction=False)
                    for digest, verdict in some:
                        pipeline.set(_key(digest), encode(verdict), ex=self._seconds)
                    await pipeline.execute()
            except StateUnavailable:
                self.dropped += len(some) + len(self._waiting)
                self._waiting.clear()
                self._leave_alone()

    def _leave_alone(self) -> None:
        self._quiet_until = asyncio.get_running_loop().time() + self._quiet


async def _values(redis: Redis, keys: Sequence[str]) -> Sequence[object]:
    if len(keys) == 1:
        return [await redis.get(keys[0])]
    if not is_cluster(redis):
        return await redis.mget(keys)
    # A cluster's MGET takes keys of one slot only.
    pipeline = redis.pipeline(transaction=False)
    for key in keys:
        pipeline.get(key)
    return await cast(Awaitable[list[object]], pipeline.execute())


def _key(digest: bytes) -> str:
    return f"sg1:verdict:{digest.hex()}"
