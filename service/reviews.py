"""Records that somebody should look at, and what they decided.

In Redis an item is JSON in the hash ``sg1:{labels}:reviews``, by the id of its record. Its place
stands in a sorted set, ``…:open`` or ``…:decided``, by the time of its coming or of the decision,
in microseconds of the server's clock. They share the braces of ``service.labels``, so that a
decision and its label are written together or not at all.

Items hold no text. Who decides looks at the text that was kept, which is recorded.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from models.taxonomy import CATEGORIES, Severity
from service.errors import BadRequest, Conflict, NotFound, StateUnavailable
from service.labels import STREAM, Label
from service.records import Record
from service.review_items import (
    VERSION,
    Outcome,
    Reason,
    Review,
    ReviewFilters,
    check_decision,
    check_name,
    check_outcome,
    is_again,
    read_review,
)
from service.state import State

ITEMS: Final = "sg1:{labels}:reviews"
OPEN: Final = f"{ITEMS}:open"
DECIDED: Final = f"{ITEMS}:decided"
MOST_LISTED: Final = 200
MOST_CLAIMED_SECONDS: Final = 86_400.0
_CHUNK: Final = 250
_EXAMINED: Final = 4000
"""Items of one call, so that it stays quick; the page may be short then."""
_MOST_SECONDS: Final = 1.0
"""After which a page is short, too."""
_TRIES: Final = 8
_CURSOR: Final = re.compile(r"r1\.(\d{1,16})")

logger = logging.getLogger(__name__)

# KEYS: items, open, decided. ARGV: id, JSON, most items, seconds that open and decided ones are
# kept. Returns whether it was added, and how many went undecided. It trims first, because deleting
# is allowed in a server that is full and adding is not; and not without end, to stay short.
_ADD: Final = """
local items, arriving = KEYS[1], redis.call('HEXISTS', KEYS[1], ARGV[1]) == 0
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local function drop(index, ids)
  for _, id in ipairs(ids) do
    redis.call('HDEL', items, id)
    redis.call('ZREM', index, id)
  end
  return #ids
end
local function old(index, seconds)
  local oldest = string.format('%.0f', now - seconds * 1000000)
  return redis.call('ZRANGEBYSCORE', index, '-inf', oldest, 'LIMIT', 0, 100)
end
drop(KEYS[3], old(KEYS[3], ARGV[5]))
local undecided = drop(KEYS[2], old(KEYS[2], ARGV[4]))
if not arriving then return {0, undecided} end
local over = redis.call('HLEN', items) + 1 - tonumber(ARGV[3])
if over > 0 then
  over = over - drop(KEYS[3], redis.call('ZRANGE', KEYS[3], 0, math.min(over, 100) - 1))
end
if over > 0 then
  undecided = undecided + drop(KEYS[2], redis.call('ZRANGE', KEYS[2], 0, math.min(over, 100) - 1))
end
-- Places differ, also where the clock was set back: a cursor is one.
local last = redis.call('ZRANGE', KEYS[2], -1, -1, 'WITHSCORES')[2]
if last and tonumber(last) >= now then now = tonumber(last) + 1 end
redis.call('HSET', items, ARGV[1], ARGV[2])
redis.call('ZADD', KEYS[2], string.format('%.0f', now), ARGV[1])
return {1, undecided}
"""
# KEYS: items, open. ARGV: lower bound, how many. The server's time in seconds, then place and JSON
# by turns.
_LIST: Final = """
local found = {redis.call('TIME')[1]}
local some = redis.call('ZRANGEBYSCORE', KEYS[2], ARGV[1], '+inf',
  'WITHSCORES', 'LIMIT', 0, ARGV[2])
for i = 1, #some, 2 do
  found[#found + 1] = some[i + 1]
  found[#found + 1] = redis.call('HGET', KEYS[1], some[i]) or ''
end
return found
"""
# KEYS: items. ARGV: id. The server's time in seconds, and the JSON.
_GET: Final = """
return {redis.call('TIME')[1], redis.call('HGET', KEYS[1], ARGV[1])}
"""
# KEYS: items. ARGV: id, JSON as it was read, new JSON. 0 where somebody came between.
_REPLACE: Final = """
if redis.call('HGET', KEYS[1], ARGV[1]) ~= ARGV[2] then return 0 end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[3])
return 1
"""
# KEYS: items, open, decided, labels. ARGV: id, JSON as it was read, new JSON, label, most labels.
_DECIDE: Final = """
if redis.call('HGET', KEYS[1], ARGV[1]) ~= ARGV[2] then return 0 end
local time = redis.call('TIME')
redis.call('ZREM', KEYS[2], ARGV[1])
redis.call('HSET', KEYS[1], ARGV[1], ARGV[3])
redis.call('ZADD', KEYS[3], string.format('%.0f', time[1] * 1000000 + time[2]), ARGV[1])
redis.call('XADD', KEYS[4], 'MAXLEN', '~', ARGV[5], '*', 'data', ARGV[4])
return 1
"""


@dataclass(frozen=True, slots=True)
class ReviewPage:
    """Items, those that wait longest first. ``next`` is the cursor of the next page, None at the
    end; a page may be short and have a next one.
    """

    items: tuple[Review, ...]
    next: str | None


@dataclass(slots=True)
class ReviewCounts:
    """What became of items here since the start; only ever growing."""

    added: int = 0
    missed: int = 0
    """Could not be added because Redis was away or full, or too many were waiting for it."""
    dropped: int = 0
    """Made room, or were too old, and nobody had decided them."""
    confirmed: int = 0
    overturned: int = 0


class Reviews:
    """At most ``most`` items; open ones are kept ``open_seconds``, decided ones
    ``decided_seconds``. All but ``ask`` and ``add`` raises ``StateUnavailable`` while Redis is
    away. ``waiting_items`` bounds how many may have been asked for and not been added. ``close``
    it after use.
    """

    def __init__(
        self,
        state: State,
        *,
        most: int = 10_000,
        open_seconds: int = 30 * 86_400,
        decided_seconds: int = 90 * 86_400,
        most_labels: int = 200_000,
        waiting_items: int = 1000,
    ) -> None:
        self.counts = ReviewCounts()
        self._state = state
        self._most = most
        self._open_seconds = open_seconds
        self._decided_seconds = decided_seconds
        self._most_labels = most_labels
        self._add = state.script(_ADD)
        self._list = state.script(_LIST)
        self._get = state.script(_GET)
        self._replace = state.script(_REPLACE)
        self._decide = state.script(_DECIDE)
        self._asked: asyncio.Queue[tuple[Record, Reason]] = asyncio.Queue(waiting_items)
        self._adder: asyncio.Task[None] | None = None

    def ask(self, record: Record, reason: Reason) -> None:
        """Has ``add`` done behind whoever asks, who waits for nothing."""
        try:
            self._asked.put_nowait((record, reason))
        except asyncio.QueueFull:
            self.counts.missed += 1
            return
        if self._adder is None:
            self._adder = asyncio.create_task(self._add_what_is_asked())

    async def close(self, seconds: float = 5.0) -> None:
        """Adds what was asked for, for so long at most, and misses the rest."""
        if self._adder is None:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._asked.join()
        self._adder.cancel()
        await asyncio.gather(self._adder, return_exceptions=True)
        self.counts.missed += self._asked.qsize()

    async def add(self, record: Record, reason: Reason) -> bool:
        """Asks for a record to be looked at, once; says whether it is new.

        What cannot be added is missed and counted, and holds nobody up.
        """
        score = record.severity_score
        values = {
            "version": VERSION,
            "id": record.id,
            "reason": reason,
            "time": record.time,
            "request_id": record.request_id,
            "direction": record.direction,
            "level": record.level,
            "severity_score": None if score is None else round(score, 4),
            "categories": record.categories,
            "policy": record.policy,
            "guard": record.guard,
            "route": record.route,
            "outcome": record.outcome,
            "key_id": record.key_id,
        }
        bounds: list[str | int] = [self._most, self._open_seconds, self._decided_seconds]
        keys = [ITEMS, OPEN, DECIDED]
        try:
            async with self._state.connected() as redis:
                arguments = [record.id, _dumps(values), *bounds]
                added, undecided = await self._add(keys, arguments, client=redis)
        except (StateUnavailable, TimeoutError):
            self.counts.missed += 1
            return False
        self.counts.added += added
        self.counts.dropped += undecided
        return bool(added)

    async def open(
        self, filters: ReviewFilters | None = None, limit: int = 50, cursor: str | None = None
    ) -> ReviewPage:
        """A page of what nobody has decided. ``BadRequest`` where the cursor is none of ours."""
        filters = filters or ReviewFilters()
        limit = max(1, min(limit, MOST_LISTED))
        place = _place(cursor)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + _MOST_SECONDS
        found: list[tuple[str, Review]] = []
        for _ in range(0, _EXAMINED, _CHUNK):
            async with self._state.connected() as redis:
                now, *flat = await self._list([ITEMS, OPEN], [f"({place}", _CHUNK], client=redis)
            for score, data in zip(flat[::2], flat[1::2], strict=True):
                place = score.decode()
                item = read_review(data)
                if item is None or not filters.match(item, float(now)):
                    continue
                if len(found) == limit:
                    return ReviewPage(tuple(one for _, one in found), f"r1.{found[-1][0]}")
                found.append((place, item))
            if len(flat) < 2 * _CHUNK:
                return ReviewPage(tuple(one for _, one in found), None)
            if loop.time() > deadline:
                break
        return ReviewPage(tuple(one for _, one in found), f"r1.{place}")

    async def waiting(self) -> int:
        """Items that nobody has decided."""
        async with self._state.connected() as redis:
            return int(await redis.zcard(OPEN))

    async def one(self, identity: str) -> Review:
        """An item, open or decided. Raises ``NotFound``."""
        return (await self._find(identity))[2]

    async def claim(self, identity: str, reviewer: str, seconds: float = 600.0) -> Review:
        """Sees that nobody else decides an item for so long; again to have it longer, and with 0
        to give it back. Raises ``BadRequest`` where that is more than a day, ``NotFound``, and
        ``Conflict`` where it is another's or decided.
        """
        check_name(reviewer)
        if not 0 <= seconds <= MOST_CLAIMED_SECONDS:
            raise BadRequest(
                f"seconds must be from 0 to {MOST_CLAIMED_SECONDS:.0f}", param="seconds"
            )

        def claimed(values: dict[str, Any], now: float) -> None:
            values["claim"] = {"reviewer": reviewer, "until": now + seconds}

        async def store(before: bytes, values: dict[str, Any], item: Review) -> bool:
            async with self._state.connected() as redis:
                arguments: list[str | bytes] = [item.id, before, _dumps(values)]
                return bool(await self._replace([ITEMS], arguments, client=redis))

        return await self._changed(identity, reviewer, claimed, store)

    async def resolve(
        self,
        identity: str,
        reviewer: str,
        outcome: Outcome,
        severity: str,
        categories: Sequence[str] = (),
        note: str = "",
        refusal: bool | None = None,
    ) -> Review:
        """Decides an item and writes its label, for good.

        ``severity`` and ``categories`` are those that the text has, whatever the guard said. The
        same decision sent again, as after a lost answer, changes nothing. Raises ``BadRequest``
        for words that are unknown or contradict each other, ``NotFound``, and ``Conflict`` where
        another reviewer holds the item or it was decided otherwise.
        """
        check_name(reviewer)
        check_decision(outcome, severity, categories, note)
        ordered = [name for name in CATEGORIES if name in categories]
        item = await self.one(identity)
        if is_again(item, reviewer, outcome, severity, ordered):
            return item
        check_outcome(item, outcome, severity, ordered)

        def decided(values: dict[str, Any], now: float) -> None:
            values["decision"] = {
                "reviewer": reviewer,
                "outcome": outcome,
                "severity": severity,
                "categories": ordered,
                "note": note,
                "time": now,
            }

        async def store(before: bytes, values: dict[str, Any], item: Review) -> bool:
            label = Label(
                id=item.id,
                request_id=item.request_id,
                role="response" if item.direction == "response" else "prompt",
                severity=int(Severity.from_label(severity)),
                categories=tuple(ordered),
                refusal=refusal,
                outcome=outcome,
                reviewer=reviewer,
                note=note,
                reason=item.reason,
                guard=item.guard,
                policy=item.policy,
                time=values["decision"]["time"],
            )
            arguments: list[str | bytes | int] = [
                item.id,
                before,
                _dumps(values),
                label.to_json(),
                self._most_labels,
            ]
            async with self._state.connected() as redis:
                keys = [ITEMS, OPEN, DECIDED, STREAM]
                return bool(await self._decide(keys, arguments, client=redis))

        item = await self._changed(identity, reviewer, decided, store)
        if outcome == "confirmed":
            self.counts.confirmed += 1
        else:
            self.counts.overturned += 1
        return item

    async def _add_what_is_asked(self) -> None:
        while True:
            record, reason = await self._asked.get()
            try:
                await self.add(record, reason)
            # Whatever it was, the next one must have its turn.
            except Exception:
                self.counts.missed += 1
                logger.exception("a review was missed")
            finally:
                self._asked.task_done()

    async def _find(self, identity: str) -> tuple[float, bytes, Review]:
        """The server's time, an item's JSON and the item."""
        async with self._state.connected() as redis:
            answer = await self._get([ITEMS], [identity], client=redis)
        # Lua's list ends before what is not there.
        if len(answer) < 2 or answer[1] is None:
            raise NotFound("there is no such review (any more)", code="review_not_found")
        item = read_review(answer[1])
        if item is None:
            raise Conflict("a later release wrote this review", code="review_unreadable")
        return float(answer[0]), answer[1], item

    async def _changed(
        self,
        identity: str,
        reviewer: str,
        change: Callable[[dict[str, Any], float], None],
        store: Callable[[bytes, dict[str, Any], Review], Awaitable[bool]],
    ) -> Review:
        """Changes an open item's JSON in place, so that what a later release put there stays."""
        for _ in range(_TRIES):
            now, before, item = await self._find(identity)
            if item.decision is not None:
                raise Conflict("this review was decided already", code="review_decided")
            if item.claimed_until > now and item.reviewer != reviewer:
                raise Conflict("another reviewer has claimed this", code="review_claimed")
            values = json.loads(before)
            change(values, now)
            if await store(before, values, item):
                return Review.from_values(values)
        raise StateUnavailable("the review is being changed by others: try again")


def _place(cursor: str | None) -> str:
    if cursor is None:
        return "0"
    place = _CURSOR.fullmatch(cursor)
    if place is None:
        raise BadRequest(
            "cursor is none of ours: send what an earlier page gave as next, unchanged",
            param="cursor",
        )
    return place[1]


def _dumps(values: dict[str, Any]) -> str:
    return json.dumps(values, separators=(",", ":"))
