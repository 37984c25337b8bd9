"""Finding records by what is known of them, newest first, and counting them by the hour.

Order and time here are those of arrival, by the server's clock: a wrong clock on a replica hides
nothing. A filter is looked up in the indexes of ``event_index``; each record found is then held
against the filters itself, since an index is only a hint. A record is found by a filter a moment
after it was written, and without filters at once.
"""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import AsyncGenerator
from dataclasses import dataclass, fields
from typing import Any, Final

from models.taxonomy import CATEGORIES, SIGNALS, Severity
from service.body import dumps
from service.errors import BadRequest
from service.event_index import (
    HOUR_MILLISECONDS,
    by,
    entry_of,
    hour_key,
    policy_id,
    position,
)
from service.records import ENTRIES, STREAM, Record
from service.state import State

MOST_LISTED: Final = 500
"""Records of one page."""
MOST_HOURS: Final = 24 * 31
_READ_HOURS: Final = 64
_EXPORTED: Final = 100
"""Records, and above hours, that are read at once, so that requests wait a few milliseconds."""
_HOUR_SECONDS: Final = HOUR_MILLISECONDS // 1000
_CURSOR: Final = re.compile(r"e1\.([0-9a-f]{20})")
_LEVELS: Final = tuple(level.label for level in Severity)
_EXAMINED: Final = 4000
"""Candidates of one call, so that writers wait a few milliseconds for it at most."""

# KEYS: stream, then indexes. ARGV: upper and lower bound of positions, most records, most
# candidates. It walks down the shortest index and asks the others for each: over 100,000 records
# that took 2 ms of the server's time at worst, and ZINTER, which has no bounds, 59. Returns where
# it stopped, empty at the end, and found positions and data by turns. What the stream no longer
# holds is removed.
_FIND: Final = """
local stream, upper, lower = KEYS[1], ARGV[1], ARGV[2]
local most, left = tonumber(ARGV[3]), tonumber(ARGV[4])
local shortest, size = 2, math.huge
for i = 2, #KEYS do
  local count = redis.call('ZLEXCOUNT', KEYS[i], lower, upper)
  if count < size then shortest, size = i, count end
end
local found, last = {}, ''
while left > 0 do
  local some = math.min(left, 250)
  local chunk = redis.call('ZREVRANGEBYLEX', KEYS[shortest], upper, lower, 'LIMIT', 0, some)
  if #chunk == 0 then return {'', found} end
  local kept = chunk
  for i = 2, #KEYS do
    if i ~= shortest and #kept > 0 then
      local scores = redis.call('ZMSCORE', KEYS[i], unpack(kept))
      local rest = {}
      for j, place in ipairs(kept) do
        if scores[j] then rest[#rest + 1] = place end
      end
      kept = rest
    end
  end
  for _, place in ipairs(kept) do
    local entry
    if #place == 20 and place:find('^%x+$') then
      local id = string.format('%.0f-%.0f', tonumber(place:sub(1, 12), 16),
        tonumber(place:sub(13), 16))
      entry = redis.call('XRANGE', stream, id, id)[1]
    end
    if entry then
      found[#found + 1], found[#found + 2] = place, entry[2][4] or ''
      if #found >= 2 * most then return {place, found} end
    else
      for i = 2, #KEYS do redis.call('ZREM', KEYS[i], place) end
    end
  end
  last = chunk[#chunk]
  upper, left = '(' .. last, left - #chunk
  if #chunk < some then return {'', found} end
end
return {last, found}
"""

# KEYS: stream. A script, since of a cluster that asks the server that dates records.
_TIME: Final = "return redis.call('TIME')"


@dataclass(frozen=True, slots=True, kw_only=True)
class Filters:
    """What records must be, all of it; None asks for nothing."""

    direction: str | None = None
    category: str | None = None
    """One that fired."""
    severity: str | None = None
    """At least this."""
    outcome: str | None = None
    route: str | None = None
    key: str | None = None
    policy: str | None = None
    """``id``, or ``id@revision``."""
    model: str | None = None
    request_id: str | None = None
    since: float | None = None
    """Arrived at or after this, in seconds since 1970."""
    until: float | None = None
    """Arrived before this."""

    def indexes(self) -> list[str]:
        """The indexes that hold every record that matches."""
        asked = {item.name: getattr(self, item.name) for item in fields(self)}
        asked["request"] = asked.pop("request_id")
        asked.pop("since"), asked.pop("until")
        if asked["severity"] == Severity.NONE.label:
            del asked["severity"]
        return [by(facet, value) for facet, value in asked.items() if value is not None]

    def match(self, record: Record) -> bool:
        """Whether a record is what is asked for; times are not looked at."""
        return (
            self.direction in (None, record.direction)
            and (self.category is None or self.category in record.categories)
            and (self.severity is None or _is_at_least(record.level, self.severity))
            and self.outcome in (None, record.outcome)
            and self.route in (None, record.route)
            and self.key in (None, record.key_id)
            and self.policy in (None, record.policy, policy_id(record.policy))
            and self.model in (None, record.model)
            and self.request_id in (None, record.request_id)
        )


@dataclass(frozen=True, slots=True)
class Event:
    """A record and its place in the order of arrival."""

    place: str
    record: Record

    @property
    def arrived(self) -> float:
        """Seconds since 1970, by the server's clock."""
        return int(self.place[:12], 16) / 1000


@dataclass(frozen=True, slots=True)
class Page:
    """Events, newest first. ``next`` is the cursor of the page after it, None at the end.

    A page may be short and have a next one: looking was ended to keep the answer quick.
    """

    events: tuple[Event, ...]
    next: str | None


@dataclass(frozen=True, slots=True)
class Count:
    """Records of one hour, by weight: how many exchanges they stand for.

    Without a category each record is counted once, with one in each category that fired.
    """

    hour: float
    """Its beginning, in seconds since 1970."""
    direction: str
    outcome: str
    category: str | None
    severity: str
    weight: float


class Events:
    """Reads records. What is asked of it raises ``StateUnavailable`` while Redis is away."""

    def __init__(self, state: State, *, most_seconds: float = 0.15) -> None:
        self._state = state
        self._most_seconds = most_seconds
        self._find_script = state.script(_FIND)
        self._time_script = state.script(_TIME)

    async def find(self, filters: Filters, limit: int = 50, cursor: str | None = None) -> Page:
        """A page of what matches. ``BadRequest`` where the cursor is none of ours."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._most_seconds
        limit = max(1, min(limit, MOST_LISTED))
        indexes = filters.indexes()
        lower, upper = _bounds(filters, cursor)
        read = self._through_indexes if indexes else self._through_stream
        found: list[Event] = []
        while True:
            # One more than is shown tells whether there is a next page.
            last, entries = await read(indexes, lower, upper, limit + 1 - len(found))
            for place, data in entries:
                record = _read(data)
                if record is not None and filters.match(record):
                    found.append(Event(place, record))
            if len(found) > limit:
                return Page(tuple(found[:limit]), f"e1.{found[limit - 1].place}")
            if not last:
                return Page(tuple(found), None)
            if loop.time() > deadline:
                return Page(tuple(found), f"e1.{last}")
            upper = last

    async def one(self, identity: str) -> Event | None:
        """The record of this id, if it is kept still."""
        async with self._state.connected() as redis:
            entry = await redis.hget(ENTRIES, identity)
            found: Any = await redis.xrange(STREAM, entry, entry) if entry else []
        if not found:
            return None
        record = _read(found[0][1].get(b"data", b""))
        return None if record is None else Event(position(found[0][0].decode()), record)

    async def now(self) -> float:
        """The server's time in seconds since 1970: ours may be wrong."""
        async with self._state.connected() as redis:
            seconds, microseconds = await self._time_script([STREAM], [], client=redis)
        return int(seconds) + int(microseconds) / 1e6

    async def hours(self, since: float, until: float) -> list[Count]:
        """Counts of the hours that touch ``since`` to ``until``, oldest first.

        ``BadRequest`` where that is more than ``MOST_HOURS``.
        """
        first, end = math.floor(since / _HOUR_SECONDS), math.ceil(until / _HOUR_SECONDS)
        if end - first > MOST_HOURS:
            raise BadRequest(
                f"since and until are more than {MOST_HOURS} hours apart: ask for less",
                param="since",
            )
        counts: list[Count] = []
        for start in range(first, end, _READ_HOURS):
            some = range(start, min(start + _READ_HOURS, end))
            async with self._state.connected() as redis, redis.pipeline(transaction=False) as asked:
                for hour in some:
                    asked.hgetall(hour_key(hour))
                answers = await asked.execute()
            for hour, of_hour in zip(some, answers, strict=True):
                read = (_count(hour, name, of_hour[name]) for name in sorted(of_hour))
                counts += (count for count in read if count is not None)
        return counts

    async def export(self, filters: Filters) -> AsyncGenerator[bytes, None]:
        """JSON lines of everything that matches, newest first, a page in memory at a time."""
        cursor: str | None = None
        while True:
            page = await self.find(filters, _EXPORTED, cursor)
            yield "".join(dumps(shown(event)) + "\n" for event in page.events).encode()
            cursor = page.next
            if cursor is None:
                return

    async def _through_indexes(
        self, indexes: list[str], lower: str, upper: str, some: int
    ) -> tuple[str, list[tuple[str, bytes]]]:
        bounds = [f"({upper}" if upper else "+", f"[{lower}" if lower else "-"]
        async with self._state.connected() as redis:
            last, found = await self._find_script(
                [STREAM, *indexes], [*bounds, some, _EXAMINED], client=redis
            )
        pairs = zip(found[::2], found[1::2], strict=True)
        return last.decode(), [(place.decode(), data) for place, data in pairs]

    async def _through_stream(
        self, indexes: list[str], lower: str, upper: str, some: int
    ) -> tuple[str, list[tuple[str, bytes]]]:
        del indexes
        if upper and not int(upper, 16):
            # The server refuses a bound before everything.
            return "", []
        async with self._state.connected() as redis:
            found: Any = await redis.xrevrange(
                STREAM,
                max=f"({entry_of(upper)}" if upper else "+",
                min=entry_of(lower) if lower else "-",
                count=some,
            )
        entries = [(position(name.decode()), values.get(b"data", b"")) for name, values in found]
        return entries[-1][0] if len(entries) == some else "", entries


def shown(event: Event) -> dict[str, Any]:
    """An event as JSON shows it: the record, when it arrived, and scores by their names."""
    record = event.record
    values = record.to_fields()
    values.pop("subject")
    values["arrived"] = event.arrived
    values["categories"] = list(record.categories)
    values["category_scores"] = dict(zip(CATEGORIES, record.category_scores, strict=False))
    values["signal_scores"] = dict(zip(SIGNALS, record.signal_scores, strict=False))
    return values


def _bounds(filters: Filters, cursor: str | None) -> tuple[str, str]:
    """The lowest position that may be shown and the first that may not; empty where there is none.

    A position's beginning stands before it and after everything earlier, so that a time is a bound.
    """
    lower = "" if filters.since is None else _moment(filters.since)
    upper = "" if filters.until is None else _moment(filters.until)
    if cursor is not None:
        place = _CURSOR.fullmatch(cursor)
        if place is None:
            raise BadRequest(
                "cursor is none of ours: send what an earlier page gave as next, unchanged",
                param="cursor",
            )
        upper = min(upper or place[1], place[1])
    return lower, upper


def _moment(seconds: float) -> str:
    return f"{min(max(math.ceil(seconds * 1000), 0), 2**48 - 1):012x}"


def _read(data: bytes) -> Record | None:
    """The record, or None where a later version writes another kind."""
    try:
        return Record.from_json(data)
    except ValueError:
        return None


def _count(hour: int, name: bytes, weight: bytes) -> Count | None:
    """A field of an hour's counters, or None where a later version counts by more."""
    try:
        direction, outcome, category, severity = name.decode().split("|")
        number = float(weight)
    except ValueError:
        return None
    return Count(
        float(hour * _HOUR_SECONDS), direction, outcome, category or None, severity, number
    )


def _is_at_least(level: str | None, least: str) -> bool:
    # A later version may know other levels.
    if level not in _LEVELS:
        return False
    return Severity.from_label(level) >= Severity.from_label(least)
