"""Finding records: as a plain look at all of them would, page by page, while others arrive."""

import asyncio
import itertools
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redis.asyncio import Redis

from models.taxonomy import CATEGORIES, Severity
from service.errors import BadRequest
from service.event_index import by
from service.events import Filters
from service.private_valkey import PrivateValkey
from service.records import Record
from tests.service.event_rig import (
    KEYS,
    LEVELS,
    MODELS,
    OUTCOMES,
    RECORD,
    ROUTES,
    ids_of,
    kept,
    scores,
    some_records,
)


async def emptied(server: PrivateValkey) -> str:
    url = await server.start()
    async with Redis.from_url(url) as redis:
        await redis.flushall()
    return url


def is_asked_for(record: Record, filters: Filters) -> bool:
    """The filters, said in another way than the service does."""
    level = Severity.from_label(record.level) if record.level else None
    fired = [
        name
        for name, score in zip(CATEGORIES, record.category_scores, strict=True)
        if score >= 0.5 and level
    ]
    wanted = {item.name: getattr(filters, item.name) for item in fields(filters)}
    checks: dict[str, Callable[[Any], bool]] = {
        "direction": lambda value: record.direction == value,
        "category": lambda value: value in fired,
        "severity": lambda value: level is not None and level >= Severity.from_label(value),
        "outcome": lambda value: record.outcome == value,
        "route": lambda value: record.route == value,
        "key": lambda value: record.key_id == value,
        "policy": lambda value: value in (record.policy, record.policy.split("@")[0]),
        "model": lambda value: record.model == value,
        "request_id": lambda value: record.request_id == value,
    }
    return all(check(wanted[name]) for name, check in checks.items() if wanted[name] is not None)


some_filters = st.builds(
    Filters,
    direction=st.sampled_from([None, "prompt", "response"]),
    category=st.sampled_from([None, None, *CATEGORIES[:5]]),
    severity=st.sampled_from([None, *LEVELS[1:]]),
    outcome=st.sampled_from([None, *OUTCOMES, "steered"]),
    route=st.sampled_from([None, *ROUTES]),
    key=st.sampled_from([*KEYS, "no-key"]),
    policy=st.sampled_from([None, "default", "default@2", "strict", "strict@9"]),
    model=st.sampled_from([None, *MODELS]),
    request_id=st.sampled_from([None, None, None, "request-3"]),
)


@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(drawn=st.lists(some_filters, min_size=1, max_size=8), seed=st.integers(0, 5))
def test_a_filter_finds_what_a_look_at_every_record_finds(
    shared: PrivateValkey, drawn: list[Filters], seed: int
) -> None:
    records = some_records(60, seed)

    async def check(directory: Path) -> None:
        async with kept(await emptied(shared), directory) as rig:
            await rig.recorder.write(records)
            await rig.index.catch_up()
            for filters in drawn:
                wanted = [record for record in records if is_asked_for(record, filters)]
                assert await rig.ids(filters) == ids_of(wanted)
                paged = await rig.every(filters, 7)
                assert [event.record.id for event in paged] == ids_of(wanted)

    with tempfile.TemporaryDirectory() as directory:
        asyncio.run(check(Path(directory)))


async def test_pages_stay_in_place_while_records_arrive(url: str, tmp_path: Path) -> None:
    records = [replace(record, direction="prompt") for record in some_records(60)]
    for filters in (Filters(), Filters(direction="prompt")):
        async with kept(url, tmp_path) as rig:
            async with rig.state.connected() as redis:
                await redis.flushall()
            await rig.write(*records[:30])
            found: list[str] = []
            cursor, arriving = None, iter(records[30:])
            while True:
                page = await rig.events.find(filters, 4, cursor)
                found += [event.record.id for event in page.events]
                cursor = page.next
                if cursor is None:
                    break
                await rig.write(next(arriving), next(arriving))

            assert found == ids_of(records[:30])


async def test_the_last_page_says_that_it_is(url: str, tmp_path: Path) -> None:
    async with kept(url, tmp_path) as rig:
        await rig.write(*some_records(10))

        for filters in (Filters(), Filters(route=ROUTES[0]), Filters(request_id="request-0")):
            everything = await rig.every(filters, 500)
            page = await rig.events.find(filters, len(everything))
            assert page.next is None
            assert len(page.events) == len(everything) > 0


async def test_a_search_that_takes_too_long_ends_and_can_be_gone_on_with(
    url: str, tmp_path: Path
) -> None:
    # Two models in one index, so that looking goes on after a call found too few.
    alike = next(
        name for name in map(str, itertools.count()) if by("model", name) == by("model", "m")
    )
    records = [
        replace(record, model=model)
        for record, model in zip(some_records(200), itertools.cycle(("m", alike)))
    ]
    async with kept(url, tmp_path) as rig:
        await rig.recorder.write(records)
        await rig.index.catch_up()
        rig.events._most_seconds = 0.0

        filters = Filters(model="m")
        first = await rig.events.find(filters, 50)
        assert first.next is not None
        assert len(first.events) < 50
        found = await rig.every(filters, 50)

    assert [event.record.id for event in found] == ids_of(
        [record for record in records if record.model == "m"]
    )


async def test_times_bound_by_arrival(url: str, tmp_path: Path) -> None:
    async with kept(url, tmp_path) as rig:
        for record in some_records(3):
            await rig.write(replace(record, direction="prompt"))
            await asyncio.sleep(0.005)
        third, second, first = (await rig.events.find(Filters())).events

        for also in (None, "prompt"):

            async def found(
                since: float | None, until: float | None, also: str | None = also
            ) -> list[str]:
                return await rig.ids(Filters(since=since, until=until, direction=also))

            # From the one on, and before the other.
            assert await found(second.arrived, None) == [third.record.id, second.record.id]
            assert await found(None, second.arrived) == [first.record.id]
            assert await found(second.arrived, third.arrived) == [second.record.id]
            assert await found(third.arrived + 1, None) == []
            assert await found(None, 0.0) == []
        page = await rig.events.find(Filters(until=third.arrived), 1)
        assert page.next is not None
        page = await rig.events.find(Filters(until=third.arrived), 1, page.next)
        assert [event.record.id for event in page.events] == [first.record.id]
        assert abs(first.arrived - time.time()) < 60


@pytest.mark.parametrize("cursor", ["", "e1.", "e1.zz", "e2." + "0" * 20, "e1." + "0" * 20 + "\n"])
async def test_a_cursor_that_is_none_of_ours_is_refused(
    url: str, tmp_path: Path, cursor: str
) -> None:
    async with kept(url, tmp_path) as rig:
        with pytest.raises(BadRequest, match="cursor is none of ours"):
            await rig.events.find(Filters(), 5, cursor)


async def test_one_record_is_found_by_its_id_at_once(url: str, tmp_path: Path) -> None:
    async with kept(url, tmp_path) as rig:
        await rig.recorder.write([RECORD])

        event = await rig.events.one(RECORD.id)
        assert event is not None
        assert event.record == RECORD
        assert await rig.events.one("another") is None


async def test_hours_hold_what_was_counted(url: str, tmp_path: Path) -> None:
    flagged = replace(RECORD, id="1", level="minor", category_scores=scores("violence"))
    async with kept(url, tmp_path) as rig:
        await rig.write(replace(RECORD, weight=2.5), flagged)
        now = time.time()

        # The hour may have turned since the records were written.
        counts = await rig.events.hours(now - 60, now + 60)

        assert all(count.hour % 3600 == 0 and abs(count.hour - now) <= 3700 for count in counts)
        assert {(one.category, one.severity, one.weight) for one in counts} == {
            (None, "none", 2.5),
            (None, "minor", 1.0),
            ("violence", "minor", 1.0),
        }
        assert await rig.events.hours(now - 86_400, now - 7200) == []
        with pytest.raises(BadRequest, match="hours apart"):
            await rig.events.hours(0, now)


async def test_counters_of_another_kind_are_passed_over(url: str, tmp_path: Path) -> None:
    async with kept(url, tmp_path) as rig:
        await rig.write(RECORD)
        (key,) = await rig.keys("sg1:{records}:hour:*")
        async with rig.state.connected() as redis:
            for name in (b"\xff", b"a|b|c|d|e"):
                await redis.hset(key, name, 1)
            await redis.hset(key, "prompt|allowed||later", "many")

        now = await rig.events.now()
        assert [count.severity for count in await rig.events.hours(now - 3600, now)] == ["none"]


async def test_what_an_index_should_not_hold_hides_nothing(url: str, tmp_path: Path) -> None:
    async with kept(url, tmp_path) as rig:
        await rig.write(RECORD)
        async with rig.state.connected() as redis:
            for place in ("x", "f" * 19, "f" * 40, "z" * 20):
                await redis.zadd(by("direction", "prompt"), {place: 0})

        assert await rig.ids(Filters(direction="prompt")) == [RECORD.id]


async def test_hours_are_kept_for_a_while(url: str, tmp_path: Path) -> None:
    async with kept(url, tmp_path, index={"hour_seconds": 1}) as rig:
        await rig.write(RECORD)
        async with rig.state.connected() as redis:
            (key,) = await redis.keys("sg1:{records}:hour:*")
            assert 0 < await redis.pttl(key) <= 1000


async def test_an_export_is_a_line_for_each(url: str, tmp_path: Path) -> None:
    records = some_records(1200)
    async with kept(url, tmp_path) as rig:
        await rig.recorder.write(records)
        await rig.index.catch_up()

        pieces = [piece async for piece in rig.events.export(Filters(direction="prompt"))]

    lines = [json.loads(line) for line in b"".join(pieces).splitlines()]
    wanted = [record for record in records if record.direction == "prompt"]
    assert [line["id"] for line in lines] == ids_of(wanted)
    assert all(piece.count(b"\n") <= 100 for piece in pieces)
    assert "subject" not in lines[0]
    assert set(lines[0]["category_scores"]) == set(CATEGORIES)
