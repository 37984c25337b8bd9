"""Records: durable when ``write`` returns, once each, bounded. Real servers, real kills."""

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from models.taxonomy import CATEGORIES, SIGNALS
from service.errors import RecordNotKept, StateUnavailable
from service.private_valkey import PrivateValkey
from service.records import ENTRIES, STREAM, Record, Recorder
from service.spool import Spool
from service.state import State

RECORD = Record(
    time=1_700_000_000.25,
    request_id="request-1",
    key_id=None,
    route="/v1/chat/completions",
    dialect="openai.chat",
    model="a-model",
    direction="response",
    field="choices[0].message.content",
    policy="default@1",
    guard="guard@1",
    level="severe",
    severity_score=0.123456,
    category_scores=tuple(0.98765 for _ in CATEGORIES),
    signal_scores=tuple(0.5 for _ in SIGNALS),
    rule=2,
    action="block",
    outcome="blocked",
    attempts=3,
    prompt_tokens=12,
    response_tokens=None,
    wasted_tokens=40,
    guard_milliseconds=1.23456,
    upstream_milliseconds=200.0,
    total_milliseconds=210.5,
    hash="ab" * 32,
    weight=1.0,
)

_PATIENCE = 30.0
"""Seconds after which a test that would hang fails."""


def records(count: int) -> list[Record]:
    return [replace(RECORD, id=f"{number:032x}", time=float(number)) for number in range(count)]


@dataclass
class Running:
    state: State
    spool: Spool
    recorder: Recorder


@pytest.fixture
def spool_path(tmp_path: Path) -> Path:
    return tmp_path / "spool.jsonl"


@asynccontextmanager
async def running(
    url: str, spool_path: Path, *, spool_bytes: int = 2**20, **options: Any
) -> AsyncIterator[Running]:
    state = await State.open(
        url,
        data_directory=spool_path.parent,
        connect_seconds=5.0,
        command_seconds=5.0,
        probe_seconds=0.05,
    )
    spool = await Spool.open(spool_path, spool_bytes)
    recorder = Recorder(state, spool, retry_seconds=0.05, **options)
    try:
        yield Running(state, spool, recorder)
    finally:
        await recorder.close()
        await spool.close()
        await state.close()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(_PATIENCE):
        # What is waited for has no event of its own.
        while not condition():  # noqa: ASYNC110 - the server has no event
            await asyncio.sleep(0.001)


async def kill(server: PrivateValkey) -> None:
    assert server.process_id is not None
    os.kill(server.process_id, signal.SIGKILL)
    await until(lambda: server.process_id is None)


async def drained(service: Running) -> None:
    await until(lambda: service.spool.lines == 0)


def read(path: Path) -> bytes:
    return path.read_bytes()


def write(path: Path, data: bytes) -> None:
    path.write_bytes(data)


async def stored(service: Running) -> list[str]:
    """Ids in the stream, oldest first."""
    return [record.id for record in reversed(await service.recorder.recent(10_000))]


def test_a_record_is_json_and_back() -> None:
    text = json.dumps(RECORD.to_fields()).encode()

    rounded = replace(
        RECORD,
        severity_score=0.1235,
        category_scores=tuple(0.9877 for _ in CATEGORIES),
        guard_milliseconds=1.235,
    )
    assert Record.from_json(text) == rounded


def test_a_record_without_a_verdict_is_json_and_back() -> None:
    record = replace(
        RECORD,
        level=None,
        severity_score=None,
        category_scores=(),
        signal_scores=(),
        rule=None,
        guard_milliseconds=0.0,
    )

    assert Record.from_json(json.dumps(record.to_fields()).encode()) == record


def test_ids_differ_unless_they_are_given() -> None:
    values = {name: value for name, value in RECORD.to_fields().items() if name != "id"}

    assert Record(**values).id != Record(**values).id


def test_keys_of_a_later_version_are_passed_over_and_one_of_a_former_may_lack() -> None:
    fields = RECORD.to_fields() | {"later": 1}
    del fields["subject"]

    assert Record.from_json(json.dumps(fields).encode()).id == RECORD.id


@pytest.mark.parametrize("name", ["id", "hash", "weight"])
def test_what_lacks_a_key_of_every_version_is_no_record(name: str) -> None:
    fields = RECORD.to_fields()
    del fields[name]

    with pytest.raises(ValueError, match=r"\w"):
        Record.from_json(json.dumps(fields).encode())


@pytest.mark.parametrize(
    "change",
    [
        {"weight": float("nan")},
        {"weight": 1e300},
        {"weight": "much"},
        {"severity_score": float("inf")},
        {"level": ["severe"]},
        {"route": 5},
        {"category_scores": ["high"]},
        {"direction": "sideways"},
    ],
)
def test_values_that_nobody_could_reckon_with_are_no_record(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        Record.from_json(json.dumps(RECORD.to_fields() | change).encode())


def test_json_that_is_nested_without_end_is_no_record() -> None:
    with pytest.raises(ValueError, match=r"\w"):
        Record.from_json(b"[" * 100_000)


@pytest.mark.parametrize("text", ["how do I hide a body", "\n", "x" * 200, "\u4f60\u597d", ""])
def test_a_text_in_the_place_of_a_models_name_is_not_kept(text: str) -> None:
    assert replace(RECORD, model=text).to_fields()["model"] == "(no name)"
    assert replace(RECORD, model="org/a-model:7b@q4").to_fields()["model"] == "org/a-model:7b@q4"


async def test_what_was_written_comes_back_newest_first(
    server: PrivateValkey, spool_path: Path
) -> None:
    async with running(await server.start(), spool_path) as service:
        first, second, third = records(3)
        await service.recorder.write([first, second])
        await service.recorder.write([third])
        await service.recorder.write([])

        assert [record.id for record in await service.recorder.recent(2)] == [third.id, second.id]
        assert (await service.recorder.recent(10))[2].time == first.time
        assert service.recorder.counts.stored == 3


async def test_callers_that_wait_together_share_a_round_trip(
    server: PrivateValkey, spool_path: Path
) -> None:
    async with running(await server.start(), spool_path, group_records=64) as service:
        await asyncio.gather(*(service.recorder.write([record]) for record in records(200)))

        async with service.state.connected() as redis:
            calls = (await redis.info("commandstats"))["cmdstat_evalsha"]["calls"]
        assert 200 / 64 <= calls <= 8
        assert len(await stored(service)) == 200


async def test_more_callers_than_may_wait_are_let_in_one_after_the_other(
    server: PrivateValkey, spool_path: Path
) -> None:
    async with running(await server.start(), spool_path, waiting_requests=2) as service:
        await asyncio.gather(*(service.recorder.write([record]) for record in records(50)))

        assert len(await stored(service)) == 50


async def test_a_record_that_comes_twice_is_kept_once(
    server: PrivateValkey, spool_path: Path
) -> None:
    async with running(await server.start(), spool_path) as service:
        await service.recorder.write([RECORD])
        await service.recorder.write([RECORD, RECORD])

        assert await stored(service) == [RECORD.id]
        assert service.recorder.counts.duplicates == 2


async def test_without_a_server_records_go_to_the_disk_and_on_when_it_is_back(
    server: PrivateValkey, spool_path: Path
) -> None:
    url = await server.start()
    await kill(server)

    async with running(url, spool_path) as service:
        await service.recorder.write(records(3))

        on_disk = [json.loads(line)["id"] for line in read(spool_path).splitlines()]
        assert on_disk == [record.id for record in records(3)]
        assert service.recorder.counts.spooled == 3
        with pytest.raises(StateUnavailable):
            await service.recorder.recent(1)

        await server.start()
        await drained(service)
        assert await stored(service) == on_disk
        assert service.recorder.counts.stored == 3


async def test_a_server_killed_in_the_middle_loses_and_doubles_nothing(
    server: PrivateValkey, spool_path: Path
) -> None:
    async with running(await server.start(), spool_path) as service:
        queue = iter(records(600))
        kept: list[str] = []

        async def client() -> None:
            for record in queue:
                await service.recorder.write([record])
                kept.append(record.id)

        clients = asyncio.gather(*(client() for _ in range(16)))
        await until(lambda: len(kept) >= 150)
        await kill(server)
        await until(lambda: len(kept) >= 400)
        await server.start()
        await clients
        await service.state.wait_available()
        await drained(service)

        assert service.recorder.counts.spooled > 0
        assert sorted(await stored(service)) == [record.id for record in records(600)]
        assert service.recorder.counts.lost == 0


async def test_the_next_start_sends_what_the_last_one_left(
    server: PrivateValkey, spool_path: Path
) -> None:
    url = await server.start()
    await kill(server)
    async with running(url, spool_path) as service:
        await service.recorder.write(records(3))
    left = read(spool_path)
    await server.start()

    async with running(url, spool_path) as service:
        await drained(service)
        assert len(await stored(service)) == 3

    # As after a crash between sending and forgetting.
    write(spool_path, left)
    async with running(url, spool_path) as service:
        await drained(service)
        assert len(await stored(service)) == 3
        assert service.recorder.counts.duplicates == 3


async def test_a_spooled_line_that_is_no_record_is_dropped_and_counted(
    server: PrivateValkey, spool_path: Path
) -> None:
    good = json.dumps(RECORD.to_fields()).encode()
    bad = [b"\0\0\0", b"[1]", b"{}", b'{"id": 5}', b'{"id": ""}', b'{"id": "a\\nb"}', b"[" * 10_000]
    write(spool_path, b"\n".join([*bad, good, b""]))

    async with running(await server.start(), spool_path) as service:
        await drained(service)

        assert await stored(service) == [RECORD.id]
        assert service.recorder.counts.unreadable == len(bad)


async def test_the_writer_is_told_when_neither_can_take_a_record(
    server: PrivateValkey, spool_path: Path
) -> None:
    url = await server.start()
    await kill(server)

    async with running(url, spool_path, spool_bytes=1500) as service:
        assert service.recorder.spool_filled == 0.0
        await service.recorder.write(records(1))
        assert 0.5 < service.recorder.spool_filled < 1.0
        with pytest.raises(RecordNotKept, match="full"):
            await service.recorder.write(records(3)[1:])

        assert service.recorder.counts.lost == 2
        await server.start()
        await drained(service)
        assert await stored(service) == [records(1)[0].id]


async def test_a_server_that_is_full_sends_records_to_the_disk(
    server: PrivateValkey, spool_path: Path
) -> None:
    async with running(await server.start(), spool_path) as service:
        async with service.state.connected() as redis:
            await redis.config_set("maxmemory", 1)
        await service.recorder.write(records(2))
        assert (service.recorder.counts.spooled, service.state.available) == (2, True)

        async with service.state.connected() as redis:
            await redis.config_set("maxmemory", 2**26)
        await drained(service)
        assert len(await stored(service)) == 2


async def test_only_so_many_records_are_kept(server: PrivateValkey, spool_path: Path) -> None:
    async with running(await server.start(), spool_path, most_records=10) as service:
        for record in records(30):
            await service.recorder.write([record])
        await service.recorder.write(records(35)[30:])

        assert await stored(service) == [record.id for record in records(35)[25:]]
        async with service.state.connected() as redis:
            assert (await redis.xlen(STREAM), await redis.hlen(ENTRIES)) == (10, 10)


async def test_only_so_long_are_records_kept(server: PrivateValkey, spool_path: Path) -> None:
    async with running(await server.start(), spool_path, retention_seconds=0.05) as service:
        first, second = records(2)
        await service.recorder.write([first])
        await asyncio.sleep(0.1)
        await service.recorder.write([second])

        assert await stored(service) == [second.id]
        async with service.state.connected() as redis:
            assert await redis.hkeys(ENTRIES) == [second.id.encode()]


async def test_without_traffic_old_records_go_too(server: PrivateValkey, spool_path: Path) -> None:
    url = await server.start()
    async with running(url, spool_path) as service:
        await service.recorder.write(records(50))
        await asyncio.sleep(0.01)

    async with (
        running(url, spool_path, retention_seconds=0.001, expire_seconds=0.01) as service,
        service.state.connected() as redis,
    ):
        async with asyncio.timeout(_PATIENCE):
            # The server has no event.
            while await redis.xlen(STREAM) or await redis.hlen(ENTRIES):  # noqa: ASYNC110
                await asyncio.sleep(0.01)


async def test_a_caller_that_went_away_leaves_its_record(
    server: PrivateValkey, spool_path: Path
) -> None:
    async with running(await server.start(), spool_path) as service:
        caller = asyncio.create_task(service.recorder.write([RECORD]))
        await asyncio.sleep(0)
        caller.cancel()
        await asyncio.gather(caller, return_exceptions=True)
        await service.recorder.write([replace(RECORD, id="another")])

        assert caller.cancelled()
        assert await stored(service) == [RECORD.id, "another"]


async def test_closing_writes_what_waits_and_then_takes_no_more(
    server: PrivateValkey, spool_path: Path
) -> None:
    async with running(await server.start(), spool_path) as service:
        waiting = asyncio.create_task(service.recorder.write([RECORD]))
        await asyncio.sleep(0)

        await service.recorder.close()

        await waiting
        assert await stored(service) == [RECORD.id]
        with pytest.raises(RecordNotKept, match="stopping"):
            await service.recorder.write([RECORD])
