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
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from operator import attrgetter
from random import getrandbits
from typing import Annotated, Any, Final

from pydantic import AllowInfNan, Field, TypeAdapter

from models.taxonomy import CATEGORIES, Role
from models.verdict import OPERATING_POINT
from service.errors import RecordNotKept, StateUnavailable
from service.logs import named
from service.spool import Spool
from service.state import State

STREAM: Final = "sg1:{records}:stream"
"""Entries with ``id`` and ``data``, the JSON of ``Record.to_fields``."""
ENTRIES: Final = "sg1:{records}:entries"
"""Record id → id of its entry in the stream."""

# KEYS: stream, entries. ARGV: most records, longest age in milliseconds, ids and data, each a line
# of one argument: packing many arguments costs the client more than splitting costs the server.
# It trims first, because deleting is allowed in a server that is full and adding is not; and no
# more than a few beyond what it adds, so that one call stays short. Returns how many were new, and
# how many were trimmed.
_STORE: Final = """
local stream, entries = KEYS[1], KEYS[2]
local new, arriving, trimmed = {}, 0, 0
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
    over, trimmed = over - 1, trimmed + 1
  end
end
for i = 1, arriving do
  local entry = redis.call('XADD', stream, '*', 'id', new[i], 'data', new[new[i]])
  redis.call('HSET', entries, new[i], entry)
end
return {arriving, trimmed}
"""

_object: Final = TypeAdapter(dict[str, Any])
_encode: Final = _object.dump_json
"""Compact JSON; three times as quick as the standard library's."""
_parse: Final = _object.validate_json
"""``ValueError`` where it is no JSON object, or nested too deeply."""

_ID: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")
"""Ids of records, here and in other versions."""

Finite = Annotated[float, AllowInfNan(False)]
Weight = Annotated[float, Field(ge=0.0, le=1e15)]
"""What can be added up."""

logger = logging.getLogger(__name__)


def new_id() -> str:
    """128 random bits in hexadecimal: unique, not secret, and made without a call of the system."""
    return f"{getrandbits(128):032x}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What is remembered of one judged field of one exchange; never any of its text."""

    id: str = field(default_factory=new_id)
    time: Finite
    """Seconds since 1970."""
    request_id: str
    key_id: str | None
    """The caller's key, or None where keys are off."""
    route: str
    dialect: str
    model: str
    """The model that the client named; what cannot be a name is not kept."""
    direction: Role
    field: str
    """Which part of the exchange was judged, such as ``messages[2].content``."""
    policy: str
    """``id@version``."""
    guard: str
    """The guard's id, which holds its version."""
    level: str | None
    """Severity by name; this and the scores are None or empty where there was no verdict."""
    severity_score: Finite | None
    """0 to 1."""
    category_scores: tuple[Finite, ...]
    """In the order of ``taxonomy.CATEGORIES``, 0 to 1."""
    signal_scores: tuple[Finite, ...]
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
    guard_milliseconds: Finite
    upstream_milliseconds: Finite
    total_milliseconds: Finite
    hash: str
    """Keyed hash of the judged text, in hexadecimal."""
    weight: Weight
    """How many exchanges this one stands for: 1 unless it passed and was drawn by sampling."""
    subject: str | None = None
    """Keyed hash of whom the client named as its user, in hexadecimal; see ``KeptTexts``."""

    @property
    def categories(self) -> tuple[str, ...]:
        """Categories that fired, in the taxonomy's order."""
        if self.level in (None, "none"):
            return ()
        scored = zip(CATEGORIES, self.category_scores, strict=False)
        return tuple(name for name, score in scored if score >= OPERATING_POINT)

    def to_fields(self) -> dict[str, Any]:
        """JSON values by name; scores with four decimals, milliseconds with three."""
        values: dict[str, Any] = dict(zip(_NAMES, _values(self), strict=True))
        values["model"] = named(self.model)
        if self.severity_score is not None:
            values["severity_score"] = round(self.severity_score, 4)
        for name in ("category_scores", "signal_scores"):
            values[name] = [round(score, 4) for score in values[name]]
        for name in ("guard_milliseconds", "upstream_milliseconds", "total_milliseconds"):
            values[name] = round(values[name], 3)
        return values

    @classmethod
    def from_json(cls, data: bytes) -> Record:
        """The reverse of ``to_fields``, from JSON. Keys of later versions are passed over.

        Raises ``ValueError`` where it is no record, or lacks what every version had.
        """
        values = _parse(data)
        # One that is made here makes its own.
        if "id" not in values:
            raise ValueError("a record lacks its id")
        return _decode(values)


_NAMES: Final = tuple(item.name for item in fields(Record))
_decode: Final = TypeAdapter(Record).validate_python
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
        expire_seconds: float = 60.0,
    ) -> None:
        self.counts = RecordCounts()
        self._state = state
        self._spool = spool
        self._store_script = state.script(_STORE)
        self._client = state.dedicated()
        self._bounds = (str(most_records), str(round(retention_seconds * 1000)))
        self._group_records = group_records
        self._retry_seconds = retry_seconds
        self._expire_seconds = expire_seconds
        self._queue: asyncio.Queue[tuple[list[Entry], asyncio.Future[None]]] = asyncio.Queue(
            waiting_requests
        )
        self._closing = False
        self._spooled = asyncio.Event()
        if spool.lines:
            self._spooled.set()
        self._writer = asyncio.create_task(self._write_groups())
        self._drainer = asyncio.create_task(self._drain())
        self._expirer = asyncio.create_task(self._expire_for_ever())

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
        return [Record.from_json(values[b"data"]) for _, values in entries]

    @property
    def spool_filled(self) -> float:
        """How much of the room on the disk is taken, 0 to 1."""
        return self._spool.filled

    async def expire(self) -> None:
        """Removes what is older than it may become. Writing does that too, while there is any."""
        while await self._stored([]) != (0, 0):
            pass

    async def close(self) -> None:
        """Writes what waits, and stops. The spool keeps what is in it for the next start."""
        self._closing = True
        await self._queue.join()
        tasks = (self._writer, self._drainer, self._expirer)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

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
        added, _ = await self._stored(entries)
        self.counts.stored += added
        self.counts.duplicates += len(entries) - added

    async def _stored(self, entries: Sequence[Entry]) -> tuple[int, int]:
        """How many were new, and how many were trimmed."""
        ids = "\n".join([identity for identity, _ in entries])
        arguments: list[str | bytes] = [
            *self._bounds,
            ids,
            b"\n".join([data for _, data in entries]),
        ]
        async with self._state.connected():
            added, trimmed = await self._store_script(
                [STREAM, ENTRIES], arguments, client=self._client
            )
        return added, trimmed

    async def _drain(self) -> None:
        problem = ""
        while True:
            await self._spooled.wait()
            await self._state.wait_available()
            try:
                sent = await self._spool.drain(self._store_lines)
            # Whatever it was, the spool keeps its lines and is tried again.
            except Exception as error:
                said = str(error) or type(error).__name__
                # The same is not said every second for as long as it lasts.
                if said != problem:
                    logger.warning("the record spool cannot be sent yet: %s", said)
                problem = said
                await asyncio.sleep(self._retry_seconds)
                continue
            problem = ""
            logger.info("%d spooled records were sent", sent)
            if not self._spool.lines:
                self._spooled.clear()

    async def _expire_for_ever(self) -> None:
        while True:
            await asyncio.sleep(self._expire_seconds)
            await self._state.wait_available()
            # Whatever it was, it is tried again.
            try:
                await self.expire()
            except Exception as error:
                logger.warning("old records cannot be removed yet: %s", error)

    async def _store_lines(self, lines: Sequence[bytes]) -> None:
        entries: list[Entry] = []
        for line in lines:
            if (identity := _id_of(line)) is None:
                self.counts.unreadable += 1
            else:
                entries.append((identity, line))
        if entries:
            await self._store(entries)


def _id_of(line: bytes) -> str | None:
    """The id in a record's JSON, or None where it is none."""
    try:
        identity = _parse(line).get("id")
    except ValueError:
        return None
    return identity if isinstance(identity, str) and _ID.fullmatch(identity) else None
