"""The score-only record of an exchange, and how it becomes durable before the answer ends.

A record holds no text: ids, scores, what was decided and why, and what it cost. It goes to Redis,
or to the spool on the disk while Redis is away; the spool is sent on when Redis is back, and what
arrives twice is dropped by its id.

In Redis the records are one stream in order of arrival, by the server's clock, so that a wrong
clock here neither hides nor drops one; beside it stands a hash of record id → entry id, which
answers "is it there already" and finds a record by its id. Both are bounded together, by number
and by age.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from operator import attrgetter
from random import getrandbits
from typing import Any, Final

from pydantic import TypeAdapter

from models.taxonomy import Role
from service.errors import RecordNotKept, StateUnavailable
from service.spool import Spool
from service.state import State

STREAM: Final = "sg1:{records}:stream"
"""Entries with ``id`` and ``data``, the JSON of ``Record.to_fields``."""
ENTRIES: Final = "sg1:{records}:entries"
"""Record id → id of its entry in the stream."""

# KEYS: stream, entries. ARGV: most records, longest age in milliseconds, ids and data, each a line
# of one argument: packing many arguments costs the client more than splitting costs the server.
# It trims first, because deleting is allowed in a server that is full and adding is not; and no
# more than it may add, so that one call stays short.
_STORE: Final = """
local stream, entries = KEYS[1], KEYS[2]
local new, arriving = {}, 0
local lines = ARGV[4]:gmatch('[^\\n]+')
for id in ARGV[3]:gmatch('[^\\n]+') do
  local data = lines()
  if not new[id] and redis.call('HEXISTS', entries, id) == 0 then
    arriving = arriving + 1
    new[arriving], new[id] = id, data
  end
end
local over = redis.call('XLEN', stream) + arriving - tonumber(ARGV[1])
local now = redis.call('TIME')
local oldest = now[1] * 1000 + math.floor(now[2] / 1000) - tonumber(ARGV[2])
local first = redis.call('XRANGE', stream, '-', '+', 'COUNT', 1)[1]
if first and (over > 0 or tonumber(first[1]:match('^%d+')) < oldest) then
  for _, entry in ipairs(redis.call('XRANGE', stream, '-', '+', 'COUNT', arriving + 16)) do
    if over <= 0 and tonumber(entry[1]:match('^%d+')) >= oldest then break end
    redis.call('XDEL', stream, entry[1])
    redis.call('HDEL', entries, entry[2][2])
    over = over - 1
  end
end
for i = 1, arriving do
  local entry = redis.call('XADD', stream, '*', 'id', new[i], 'data', new[new[i]])
  redis.call('HSET', entries, new[i], entry)
end
return arriving
"""

_encode: Final = TypeAdapter(dict[str, Any]).dump_json
"""Compact JSON; three times as quick as the standard library's."""

logger = logging.getLogger(__name__)


def new_id() -> str:
    """128 random bits in hexadecimal: unique, not secret, and made without a call of the system."""
    return f"{getrandbits(128):032x}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What is remembered of one judged field of one exchange; never any of its text."""

    id: str = field(default_factory=new_id)
    time: float
    """Seconds since 1970."""
    request_id: str
    key_id: str | None
    """The caller's key, or None where keys are off."""
    route: str
    dialect: str
    model: str
    """The model that the client named."""
    direction: Role
    field: str
    """Which part of the exchange was judged, such as ``messages[2].content``."""
    policy: str
    """``id@version``."""
    guard: str
    """The guard's id, which holds its version."""
    level: str | None
    """Severity by name; this and the scores are None or empty where there was no verdict."""
    severity_score: float | None
    """0 to 1."""
    category_scores: tuple[float, ...]
    """In the order of ``taxonomy.CATEGORIES``, 0 to 1."""
    signal_scores: tuple[float, ...]
    """In the order of ``taxonomy.SIGNALS``, 0 to 1."""
    rule: int | None
    """Index of the policy's rule that matched."""
    action: str
    outcome: str
    attempts: int
    """Answers that the upstream was asked for."""
    prompt_tokens: int | None
    """As the upstream counts; None where it did not say."""
    response_tokens: int | None
    wasted_tokens: int
    """Generated and thrown away."""
    guard_milliseconds: float
    upstream_milliseconds: float
    total_milliseconds: float
    hash: str
    """Keyed hash of the judged text, in hexadecimal."""
    weight: float
    """How many exchanges this one stands for: 1 unless it passed and was drawn by sampling."""

    def to_fields(self) -> dict[str, Any]:
        """JSON values by name; scores with four decimals, milliseconds with three."""
        values: dict[str, Any] = dict(zip(_NAMES, _values(self), strict=True))
        if self.severity_score is not None:
            values["severity_score"] = round(self.severity_score, 4)
        for name in ("category_scores", "signal_scores"):
            values[name] = [round(score, 4) for score in values[name]]
        for name in ("guard_milliseconds", "upstream_milliseconds", "total_milliseconds"):
            values[name] = round(values[name], 3)
        return values

    @classmethod
    def from_fields(cls, values: Mapping[str, Any]) -> Record:
        """The reverse of ``to_fields``. Keys of later versions are passed over.

        Raises ``ValueError`` where a key is missing.
        """
        missing = [name for name in _NAMES if name not in values]
        if missing:
            raise ValueError(f"the record lacks {', '.join(missing)}")
        known = {name: values[name] for name in _NAMES}
        known["category_scores"] = tuple(known["category_scores"])
        known["signal_scores"] = tuple(known["signal_scores"])
        return cls(**known)


_NAMES: Final = tuple(item.name for item in fields(Record))
_values: Final = attrgetter(*_NAMES)


@dataclass(slots=True)
class RecordCounts:
    """What became of records since the start; only ever growing."""

    stored: int = 0
    """Put into Redis, straight or from the spool."""
    spooled: int = 0
    """Put onto the disk because Redis could not take them."""
    duplicates: int = 0
    """Arrived in Redis again, and were dropped there."""
    unreadable: int = 0
    """Lines of the spool that were no record, and were dropped."""
    lost: int = 0
    """Could be kept nowhere; each one's writer was told."""


Entry = tuple[str, bytes]
"""A record's id and its JSON."""


class Recorder:
    """Makes records durable, many at once. Make it on the event loop; ``close`` it after use.

    One task takes everything that waits and stores it in one round trip, so the cost of a trip
    and of the server's disk sync is shared by whoever waits at the time. ``waiting_requests``
    bounds how many calls of ``write`` may wait; more wait to be let in. ``most_records`` and
    ``retention_seconds`` bound what Redis holds.
    """

    def __init__(
        self,
        state: State,
        spool: Spool,
        *,
        most_records: int = 100_000,
        retention_seconds: float = 30 * 86_400.0,
        waiting_requests: int = 1024,
        group_records: int = 256,
        retry_seconds: float = 1.0,
    ) -> None:
        self.counts = RecordCounts()
        self._state = state
        self._spool = spool
        self._store_script = state.script(_STORE)
        self._client = state.dedicated()
        self._bounds = (str(most_records), str(round(retention_seconds * 1000)))
        self._group_records = group_records
        self._retry_seconds = retry_seconds
        self._queue: asyncio.Queue[tuple[list[Entry], asyncio.Future[None]]] = asyncio.Queue(
            waiting_requests
        )
        self._closing = False
        self._spooled = asyncio.Event()
        if spool.lines:
            self._spooled.set()
        self._writer = asyncio.create_task(self._write_groups())
        self._drainer = asyncio.create_task(self._drain())

    async def write(self, records: Sequence[Record]) -> None:
        """Returns when the records are durable: in Redis, or synced in the spool.

        Raises ``RecordNotKept`` where neither could take them. A caller that is cancelled leaves
        them in the queue, and they are written all the same.
        """
        if not records:
            return
        if self._closing:
            raise RecordNotKept("the service is stopping: send the request again")
        entries = [(record.id, _encode(record.to_fields())) for record in records]
        done = asyncio.get_running_loop().create_future()
        await self._queue.put((entries, done))
        await done

    async def recent(self, count: int) -> list[Record]:
        """The last ``count`` records to arrive, newest first.

        One that waited in the spool counts from when it came out. Raises ``StateUnavailable``.
        """
        async with self._state.connected() as redis:
            entries: Any = await redis.xrevrange(STREAM, count=count)
        return [Record.from_fields(json.loads(values[b"data"])) for _, values in entries]

    async def close(self) -> None:
        """Writes what waits, and stops. The spool keeps what is in it for the next start."""
        self._closing = True
        await self._queue.join()
        for task in (self._writer, self._drainer):
            task.cancel()
        await asyncio.gather(self._writer, self._drainer, return_exceptions=True)

    async def _write_groups(self) -> None:
        while True:
            group = [await self._queue.get()]
            size = len(group[0][0])
            while size < self._group_records and not self._queue.empty():
                group.append(self._queue.get_nowait())
                size += len(group[-1][0])
            failure: RecordNotKept | None = None
            try:
                await self._keep([entry for entries, _ in group for entry in entries])
            except RecordNotKept as error:
                failure = error
                self.counts.lost += size
            # Whatever it was, the callers must hear of it and the next group must have its turn.
            except Exception:
                logger.exception("a group of records was lost")
                failure = RecordNotKept("the record could not be kept: see the log")
                self.counts.lost += size
            for _, done in group:
                self._queue.task_done()
                # Done already where the caller was cancelled.
                if not done.done():
                    if failure is None:
                        done.set_result(None)
                    else:
                        done.set_exception(failure)

    async def _keep(self, entries: list[Entry]) -> None:
        try:
            await self._store(entries)
        except StateUnavailable:
            await self._spool.append([data for _, data in entries])
            self.counts.spooled += len(entries)
            self._spooled.set()

    async def _store(self, entries: Sequence[Entry]) -> None:
        ids = "\n".join([identity for identity, _ in entries])
        arguments: list[str | bytes] = [
            *self._bounds,
            ids,
            b"\n".join([data for _, data in entries]),
        ]
        async with self._state.connected():
            added = await self._store_script([STREAM, ENTRIES], arguments, client=self._client)
        self.counts.stored += added
        self.counts.duplicates += len(entries) - added

    async def _drain(self) -> None:
        while True:
            await self._spooled.wait()
            await self._state.wait_available()
            try:
                sent = await self._spool.drain(self._store_lines)
            # Whatever it was, the spool keeps its lines and is tried again.
            except Exception as error:
                logger.warning("the record spool cannot be sent yet: %s", error)
                await asyncio.sleep(self._retry_seconds)
                continue
            logger.info("%d spooled records were sent", sent)
            if not self._spool.lines:
                self._spooled.clear()

    async def _store_lines(self, lines: Sequence[bytes]) -> None:
        entries: list[Entry] = []
        for line in lines:
            try:
                entries.append((json.loads(line)["id"], line))
            except (ValueError, KeyError, TypeError):
                self.counts.unreadable += 1
        if entries:
            await self._store(entries)
