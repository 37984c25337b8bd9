"""Indexes and counters: each record once, whoever dies; trimmed with the stream."""

import asyncio
import json
import signal
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from service.event_index import (
    GROUP,
    SETS,
    by,
    counters_of,
    entry_of,
    indexes_of,
    position,
)
from service.events import Filters
from service.records import ENTRIES, STREAM, Record
from tests.service.event_rig import RECORD, Kept, ids_of, kept, scores, some_records, until

# How the first release wrote, before there were indexes.
OLD_STORE = """
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

READS_AND_HANGS = """
import asyncio, sys
from pathlib import Path
from service.event_index import EventIndex
from service.state import State

async def main():
    state = await State.open(sys.argv[1], data_directory=Path(sys.argv[2]))
    print(len(await EventIndex(state).read()), flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


async def write_as_before(redis: Any, records: list[Record], most: int = 100_000) -> None:
    values = []
    for record in records:
        fields = record.to_fields()
        del fields["subject"]
        values.append(json.dumps(fields))
    ids = "\n".join(record.id for record in records)
    await redis.eval(OLD_STORE, 2, STREAM, ENTRIES, most, 30 * 86_400_000, ids, "\n".join(values))


async def counted(rig: Kept) -> Counter[str]:
    """All counters of all hours."""
    total: Counter[str] = Counter()
    for key in await rig.keys("sg1:{records}:hour:*"):
        async with rig.state.connected() as redis:
            fields: Any = await redis.hgetall(key)
        for name, weight in fields.items():
            total[name.decode()] += float(weight)  # type: ignore[assignment]
    return total


def expected(records: list[Record]) -> Counter[str]:
    total: Counter[str] = Counter()
    for record in records:
        for name in counters_of(record):
            total[name] += record.weight  # type: ignore[assignment]
    return total


async def pending(rig: Kept) -> int:
    async with rig.state.connected() as redis:
        return int((await redis.xpending(STREAM, GROUP))["pending"])


async def members(rig: Kept, name: str) -> list[str]:
    async with rig.state.connected() as redis:
        found: Any = await redis.zrange(name, 0, -1)
    return [member.decode() for member in found]


def test_a_position_is_an_entry_and_back_and_in_its_order() -> None:
    entries = ["0-1", "1700000000000-0", "1700000000000-9", "1700000000000-10", "1700000000001-0"]

    assert [entry_of(position(entry)) for entry in entries] == entries
    assert sorted(map(position, entries)) == [position(entry) for entry in entries]


def test_what_a_client_wrote_is_in_no_name_of_a_key() -> None:
    record = replace(RECORD, model="my name is Ann\n" * 1000, request_id="Ann")

    names = indexes_of(record)

    assert all(len(name) < 80 and "Ann" not in name for name in names)


def test_the_number_of_keys_is_bounded_whatever_clients_name() -> None:
    names = {by("model", f"model-{number}") for number in range(100_000)}

    assert len(names) <= 4096


async def test_each_record_is_counted_with_its_weight(url: str, tmp_path: Path) -> None:
    async with kept(url, tmp_path) as rig:
        violent = replace(
            RECORD, id="2", level="severe", category_scores=scores("violence", "drugs"), weight=1.0
        )
        await rig.write(replace(RECORD, weight=4.0), replace(RECORD, id="1", weight=4.0), violent)

        assert await counted(rig) == {
            "prompt|allowed||none": 8.0,
            "prompt|allowed||severe": 1.0,
            "prompt|allowed|violence|severe": 1.0,
            "prompt|allowed|drugs|severe": 1.0,
        }


async def test_two_indexers_count_each_record_once(url: str, tmp_path: Path) -> None:
    records = some_records(400)
    async with (
        kept(url, tmp_path / "1", index={"poll_seconds": 0.01, "batch": 7}) as one,
        kept(url, tmp_path / "2", index={"poll_seconds": 0.01, "batch": 7}) as two,
    ):
        one.index.start()
        two.index.start()
        for start in range(0, 400, 10):
            await one.recorder.write(records[start : start + 10])

        await until(lambda: _is(one.index.counts.indexed + two.index.counts.indexed == 400))
        assert await counted(one) == expected(records)
        assert await one.ids(Filters(direction="prompt")) == ids_of(
            [record for record in records if record.direction == "prompt"]
        )


async def _is(value: bool) -> bool:
    return value


async def test_what_a_killed_indexer_read_is_counted_once_by_another(
    url: str, tmp_path: Path
) -> None:
    records = some_records(30)
    async with kept(url, tmp_path, index={"claim_seconds": 0.2, "poll_seconds": 0.01}) as rig:
        await rig.recorder.write(records[:20])
        dying = await asyncio.create_subprocess_exec(
            sys.executable, "-c", READS_AND_HANGS, url, str(tmp_path / "other"),
            stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        assert dying.stdout is not None
        async with asyncio.timeout(120):
            assert int(await dying.stdout.readline()) == 20
        dying.send_signal(signal.SIGKILL)
        await dying.wait()
        assert await counted(rig) == {}

        rig.index.start()
        await rig.recorder.write(records[20:])
        await until(lambda: _is(rig.index.counts.indexed == 30))

        assert rig.index.counts.claimed == 20
        assert await counted(rig) == expected(records)
        assert await pending(rig) == 0


async def test_one_that_was_only_slow_counts_nothing_again(url: str, tmp_path: Path) -> None:
    records = some_records(10)
    async with kept(url, tmp_path, index={"claim_seconds": 0.01}) as rig:
        await rig.recorder.write(records)
        read = await rig.index.read()
        await asyncio.sleep(0.05)

        assert await rig.index.index(await rig.index.claim()) == 10
        assert await rig.index.index(read) == 0
        assert await counted(rig) == expected(records)


async def test_records_of_before_are_indexed_too_and_old_writers_may_stay(
    url: str, tmp_path: Path
) -> None:
    records = some_records(60)
    async with kept(url, tmp_path) as rig:
        async with rig.state.connected() as redis:
            await write_as_before(redis, records[:20])
        await rig.write(*records[20:40])
        async with rig.state.connected() as redis:
            await write_as_before(redis, records[40:])
        await rig.index.catch_up()

        assert await counted(rig) == expected(records)
        blocked = [record for record in records if record.outcome == "blocked"]
        assert await rig.ids(Filters(outcome="blocked")) == ids_of(blocked)


async def test_what_an_old_writer_trimmed_is_passed_over_and_removed(
    url: str, tmp_path: Path
) -> None:
    records = [replace(record, direction="prompt") for record in some_records(30)]
    name = by("direction", "prompt")
    async with kept(url, tmp_path) as rig:
        await rig.write(*records[:20])
        async with rig.state.connected() as redis:
            await write_as_before(redis, records[20:], most=15)

        # Nobody trimmed the index yet.
        assert len(await members(rig, name)) == 20
        assert await rig.ids(Filters(direction="prompt")) == ids_of(records[15:20])
        assert len(await members(rig, name)) == 5
        await rig.index.catch_up()
        assert await rig.ids(Filters(direction="prompt")) == ids_of(records[15:])


async def test_indexes_are_trimmed_by_the_streams_first_entry(url: str, tmp_path: Path) -> None:
    records = [
        replace(record, direction="prompt", model=f"model-{number}")
        for number, record in enumerate(some_records(50))
    ]
    async with kept(url, tmp_path, most_records=10) as rig:
        await rig.write(*records)

        # What is touched trims itself; what no new record stands in is left to the sweep.
        assert len(await members(rig, by("direction", "prompt"))) == 10
        await rig.index.sweep()
        names = await rig.keys("sg1:{records}:by:*")
        async with rig.state.connected() as redis:
            listed: Any = await redis.smembers(SETS)
        assert {name.decode() for name in listed} == names
        assert sum([len(await members(rig, name)) for name in names]) == sum(
            len(indexes_of(record)) for record in records[40:]
        )


async def test_an_entry_that_is_no_record_holds_up_nothing(url: str, tmp_path: Path) -> None:
    async with kept(url, tmp_path) as rig:
        async with rig.state.connected() as redis:
            endless = json.dumps(RECORD.to_fields() | {"weight": 1e300}).encode()
            for data in (b"\xff", b"[]", b'{"id": "x"}', b"[" * 100_000, endless):
                await redis.xadd(STREAM, {"id": "x", "data": data})
            await redis.xadd(STREAM, {"later": "kind"})
        await rig.write(RECORD)

        assert rig.index.counts.unreadable == 6
        assert await pending(rig) == 0
        for filters in (Filters(direction="prompt"), Filters()):
            assert await rig.ids(filters) == [RECORD.id]


async def test_a_server_that_was_emptied_is_indexed_anew(url: str, tmp_path: Path) -> None:
    async with kept(url, tmp_path) as rig:
        await rig.write(RECORD)
        async with rig.state.connected() as redis:
            await redis.flushall()
        await rig.write(replace(RECORD, id="2"))

        assert await rig.ids(Filters(direction="prompt")) == ["2"]


async def test_a_full_server_indexes_later_and_loses_no_count(
    url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    records = some_records(10)
    async with kept(url, tmp_path, index={"claim_seconds": 60.0, "poll_seconds": 0.01}) as rig:
        await rig.recorder.write(records)
        async with rig.state.connected() as redis:
            await redis.config_set("maxmemory", 1)
        try:
            rig.index.start()
            await asyncio.sleep(0.2)
            assert await counted(rig) == {}
            # Said once, however often it was tried.
            assert caplog.text.count("cannot be indexed yet") == 1
        finally:
            async with rig.state.connected() as redis:
                await redis.config_set("maxmemory", 2**26)

        await until(lambda: _is(rig.index.counts.indexed == 10))
        assert await counted(rig) == expected(records)


async def test_consumers_that_are_gone_are_forgotten_unless_they_hold_something(
    url: str, tmp_path: Path
) -> None:
    async with kept(url, tmp_path) as gone, kept(url, tmp_path / "2") as holding:
        await gone.write(RECORD)
        await gone.recorder.write([replace(RECORD, id="2")])
        await holding.index.read()
        async with gone.state.connected() as redis:
            await gone.index._forget_script([STREAM], [GROUP, 0], client=redis)
            left = [one["name"].decode() for one in await redis.xinfo_consumers(STREAM, GROUP)]

        assert left == [holding.index.consumer]
