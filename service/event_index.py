"""Indexes and hourly counters of the records, made behind the write path.

Writers know nothing of this: every replica runs an ``EventIndex``, and all of them share one
consumer group on the records' stream. One script acknowledges an entry and indexes and counts it
where it was still unacknowledged, so each entry is counted once, whichever replica does it and
whichever died over it.

An index is a sorted set of positions, ``sg1:{records}:by:<facet>:<value>``. A position is an
entry's id (the server's time in milliseconds and a number) in hexadecimal of a fixed width. All
scores are 0, so that the order of names is the order of arrival, ties in time included. An index
is a hint: writers drop records without telling it, and what it names may be gone; so whoever reads
it looks at the record too.

Facets whose values others choose go into buckets, ``crc32 % 4096``. That bounds the number of
sets, and keeps what a client wrote out of the names of keys.

Counters are one hash an hour of arrival, ``sg1:{records}:hour:<hours since 1970>``, of
``direction|outcome|category|severity`` → sum of weights. Where the category is empty, each record
is counted once; where it is named, each category that fired is counted, so those overlap.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final
from zlib import crc32

from redis.exceptions import ResponseError

from models.taxonomy import Severity
from service.errors import StateUnavailable
from service.records import STREAM, Record, new_id
from service.state import State

GROUP: Final = "index"
SETS: Final = "sg1:{records}:sets"
"""Names of the indexes that there may be."""
_SWEPT: Final = "sg1:{records}:swept"
_BUCKETS: Final = 4096
HOUR_MILLISECONDS: Final = 3_600_000

# Position of the stream's first entry, as a bound below which nothing is left; in each script.
_FIRST: Final = """
local function first_left(stream)
  local first = redis.call('XRANGE', stream, '-', '+', 'COUNT', 1)[1]
  if not first then return '+' end
  local time, number = first[1]:match('^(%d+)-(%d+)$')
  return '(' .. string.format('%012x%08x', tonumber(time), tonumber(number))
end
"""

# KEYS: stream, names of sets, then the sets and hours that ARGV[3] means by their number in KEYS.
# ARGV: group, seconds to keep an hour, JSON: [[entry, position, [set…], hour, weight, [field…]]…].
# The names come first: a server that is full refuses that, before anything was acknowledged.
_INDEX: Final = (
    _FIRST
    + """
local stream, names = KEYS[1], KEYS[2]
local batch = cjson.decode(ARGV[3])
local sets, hours = {}, {}
for _, entry in ipairs(batch) do
  for _, set in ipairs(entry[3]) do sets[set] = true end
end
for set in pairs(sets) do redis.call('SADD', names, KEYS[set]) end
local counted = 0
for _, entry in ipairs(batch) do
  if redis.call('XACK', stream, ARGV[1], entry[1]) == 1 then
    counted = counted + 1
    for _, set in ipairs(entry[3]) do redis.call('ZADD', KEYS[set], 0, entry[2]) end
    local hour = KEYS[entry[4]]
    if hour then
      hours[hour] = true
      for _, field in ipairs(entry[6]) do redis.call('HINCRBYFLOAT', hour, field, entry[5]) end
    end
  end
end
for hour in pairs(hours) do redis.call('EXPIRE', hour, ARGV[2]) end
local left = first_left(stream)
for set in pairs(sets) do redis.call('ZREMRANGEBYLEX', KEYS[set], '-', left) end
return counted
"""
)

# KEYS: stream, names of sets, sets. Forgets what the stream no longer holds, and empty sets' names.
_TRIM: Final = (
    _FIRST
    + """
local left = first_left(KEYS[1])
for i = 3, #KEYS do
  redis.call('ZREMRANGEBYLEX', KEYS[i], '-', left)
  if redis.call('EXISTS', KEYS[i]) == 0 then redis.call('SREM', KEYS[2], KEYS[i]) end
end
"""
)

# KEYS: stream. ARGV: group, milliseconds. Consumers that neither hold anything nor came by lately;
# in one script, because one that is removed takes along what it has not acknowledged.
_FORGET_CONSUMERS: Final = """
for _, consumer in ipairs(redis.call('XINFO', 'CONSUMERS', KEYS[1], ARGV[1])) do
  local about = {}
  for i = 1, #consumer, 2 do about[consumer[i]] = consumer[i + 1] end
  if about.pending == 0 and about.idle >= tonumber(ARGV[2]) then
    redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], about.name)
  end
end
"""

logger = logging.getLogger(__name__)

_LEVELS: Final = tuple(level.label for level in Severity)
Delivered = tuple[bytes, dict[bytes, bytes] | None]
"""An entry's id and its fields; None where it was deleted meanwhile."""


def position(entry: str) -> str:
    """An entry's id as it stands in indexes."""
    milliseconds, _, number = entry.partition("-")
    return f"{int(milliseconds):012x}{int(number):08x}"


def entry_of(place: str) -> str:
    """The reverse of ``position``."""
    return f"{int(place[:12], 16)}-{int(place[12:] or '0', 16)}"


def by(facet: str, value: str) -> str:
    """The name of the index of records whose ``facet`` is ``value``.

    ``severity`` means at least that. Of route, key, policy, model and request the index may hold
    other values' records too.
    """
    if facet in ("route", "key", "policy", "model", "request"):
        value = f"{crc32(value.encode('utf-8', 'surrogatepass')) % _BUCKETS:03x}"
    return f"sg1:{{records}}:by:{facet}:{value}"


def hour_key(hour: int) -> str:
    """The counters of an hour, in hours since 1970."""
    return f"sg1:{{records}}:hour:{hour}"


def policy_id(label: str) -> str:
    """``id`` of ``id@revision``."""
    return label.partition("@")[0]


def indexes_of(record: Record) -> list[str]:
    """The indexes that a record stands in."""
    found = [
        by("direction", record.direction),
        by("outcome", record.outcome),
        by("route", record.route),
        by("policy", record.policy),
        by("policy", policy_id(record.policy)),
        by("model", record.model),
        by("request", record.request_id),
    ]
    if record.key_id is not None:
        found.append(by("key", record.key_id))
    if record.level in _LEVELS:
        # At least none is nearly everything, and so no help in finding.
        found += (by("severity", name) for name in _LEVELS[1 : _LEVELS.index(record.level) + 1])
    found += (by("category", name) for name in record.categories)
    return found


def counters_of(record: Record) -> list[str]:
    """The fields of its hour in which a record is counted."""
    start, end = f"{record.direction}|{record.outcome}|", f"|{record.level or 'unknown'}"
    return [start + category + end for category in ("", *record.categories)]


@dataclass(slots=True)
class IndexCounts:
    """What this replica did; only ever growing."""

    indexed: int = 0
    claimed: int = 0
    """Left by another replica that did not finish."""
    unreadable: int = 0
    """Entries that are no record; acknowledged, and in no index."""


class EventIndex:
    """Indexes records as they come. ``start`` it on the event loop; ``close`` it after use.

    New records are looked for every ``poll_seconds``; what another replica took and did not finish
    within ``claim_seconds`` is taken over. Hours are kept for ``hour_seconds``. While state is
    away it waits, and goes on after.
    """

    def __init__(
        self,
        state: State,
        *,
        poll_seconds: float = 0.25,
        claim_seconds: float = 10.0,
        sweep_seconds: float = 60.0,
        hour_seconds: int = 90 * 86_400,
        batch: int = 200,
    ) -> None:
        self.counts = IndexCounts()
        self.consumer = new_id()
        self._state = state
        self._poll_seconds = poll_seconds
        self._claim_seconds = claim_seconds
        self._sweep_seconds = sweep_seconds
        self._hour_seconds = hour_seconds
        self._batch = batch
        self._is_behind = False
        """Whether entries may wait that this replica was given and has not indexed."""
        self._index_script = state.script(_INDEX)
        self._trim_script = state.script(_TRIM)
        self._forget_script = state.script(_FORGET_CONSUMERS)
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begins to index in the background."""
        self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Stops; what was read and not indexed is left to another replica, or the next start."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def read(self) -> list[Delivered]:
        """The next entries that nobody was given yet; they are this replica's until indexed."""
        async with self._state.connected() as redis:
            with contextlib.suppress(_NoGroup):
                return await self._asked(redis)
            # The first look ever, or somebody emptied the server: records from before count too.
            with contextlib.suppress(ResponseError):
                await redis.xgroup_create(STREAM, GROUP, "0", mkstream=True)
            return await self._asked(redis)

    async def claim(self) -> list[Delivered]:
        """Takes over what was read too long ago and not indexed."""
        async with self._state.connected() as redis:
            with _group_missing():
                answer: Any = await redis.xautoclaim(
                    STREAM,
                    GROUP,
                    self.consumer,
                    min_idle_time=round(self._claim_seconds * 1000),
                    count=self._batch,
                )
        # Redis before 7 names what was deleted meanwhile by nothing.
        claimed: list[Delivered] = [one for one in answer[1] if one[0] is not None]
        self.counts.claimed += len(claimed)
        return claimed

    async def index(self, entries: Sequence[Delivered]) -> int:
        """Indexes and acknowledges; returns how many this call was the first to do."""
        keys = [STREAM, SETS]
        numbers: dict[str, int] = {}

        def number(key: str) -> int:
            if key not in numbers:
                keys.append(key)
                numbers[key] = len(keys)
            return numbers[key]

        batch: list[list[Any]] = []
        for name, values in entries:
            entry = name.decode()
            record = self._read(values)
            if record is None:
                batch.append([entry, "", [], 0, "0", []])
                continue
            hour = int(entry.partition("-")[0]) // HOUR_MILLISECONDS
            sets = [number(key) for key in indexes_of(record)]
            fields = counters_of(record)
            weight = repr(float(record.weight))
            batch.append([entry, position(entry), sets, number(hour_key(hour)), weight, fields])
        if not batch:
            return 0
        async with self._state.connected() as redis:
            arguments: list[str | int] = [GROUP, self._hour_seconds, json.dumps(batch)]
            indexed = int(await self._index_script(keys, arguments, client=redis))
        self.counts.indexed += indexed
        return indexed

    async def catch_up(self) -> None:
        """Indexes all that nobody was given yet."""
        while entries := await self.read():
            await self.index(entries)

    async def sweep(self) -> None:
        """Trims every index, and forgets consumers that are long gone."""
        async with self._state.connected() as redis:
            members: Any = await redis.smembers(SETS)
        names = sorted(name.decode() for name in members)
        for start in range(0, len(names), 256):
            async with self._state.connected() as redis:
                keys = [STREAM, SETS, *names[start : start + 256]]
                await self._trim_script(keys, [], client=redis)
        async with self._state.connected() as redis:
            gone = round(max(3600.0, 10 * self._claim_seconds) * 1000)
            await self._forget_script([STREAM], [GROUP, gone], client=redis)

    async def _asked(self, redis: Any) -> list[Delivered]:
        with _group_missing():
            # What this replica was given before Redis went away comes first.
            for place in ("0", ">") if self._is_behind else (">",):
                answer: Any = await redis.xreadgroup(
                    GROUP, self.consumer, {STREAM: place}, count=self._batch
                )
                if answer and answer[0][1]:
                    return list(answer[0][1])
                self._is_behind = False
        return []

    def _read(self, values: dict[bytes, bytes] | None) -> Record | None:
        try:
            return Record.from_json((values or {})[b"data"])
        except (ValueError, KeyError):
            self.counts.unreadable += 1
            return None

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        next_claim = next_sweep = loop.time()
        problem = ""
        while True:
            await self._state.wait_available()
            try:
                entries = await self.read()
                done = await self.index(entries)
                if loop.time() >= next_claim:
                    # What is left has come of age by the time of the next look, at the latest.
                    while claimed := await self.claim():
                        done += await self.index(claimed)
                    next_claim = loop.time() + self._claim_seconds / 2
                if loop.time() >= next_sweep:
                    next_sweep = loop.time() + self._sweep_seconds
                    if await self._is_mine_to_sweep():
                        await self.sweep()
                problem = "" if done else problem
                if len(entries) == self._batch:
                    continue
            # Whatever it was, records wait in the stream, and are tried again.
            except Exception as error:
                is_ours = isinstance(error, StateUnavailable | _NoGroup)
                said = str(error) if is_ours else type(error).__name__
                # The same is not said four times a second for as long as it lasts.
                if said != problem:
                    place = None if is_ours else error
                    logger.warning("records cannot be indexed yet: %s", said, exc_info=place)
                problem = said
                self._is_behind = True
            await asyncio.sleep(self._poll_seconds)

    async def _is_mine_to_sweep(self) -> bool:
        async with self._state.connected() as redis:
            milliseconds = max(1, round(self._sweep_seconds * 900))
            return bool(await redis.set(_SWEPT, b"1", nx=True, px=milliseconds))


class _NoGroup(Exception):
    """The consumer group is not there."""


@contextlib.contextmanager
def _group_missing() -> Iterator[None]:
    try:
        yield
    except ResponseError as error:
        if str(error).startswith("NOGROUP"):
            raise _NoGroup("the consumer group is not there yet") from error
        raise
