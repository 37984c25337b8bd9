"""Rate limits: sliding, shared, by the server's clock; and what holds without it. A real Valkey."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis.asyncio import Redis

from service.errors import RateLimited
from service.keys import Limits, Rate
from service.private_valkey import PrivateValkey
from service.rate_limits import SLICES, LocalWindows, RateLimits, spoken
from service.state import State

ROUTE = "/v1/chat/completions"
DAY = 86_400
"""Of long windows a slow machine leaves no slice while a test runs."""
DAILY: Limits = {"*": (Rate(3, DAY),)}


@asynccontextmanager
async def opened(server: PrivateValkey, tmp_path: Path) -> AsyncIterator[RateLimits]:
    """Limits as a replica has them, with patience for a busy machine."""
    state = await State.open(
        await server.start(),
        data_directory=tmp_path,
        connect_seconds=30.0,
        command_seconds=30.0,
        probe_seconds=0.05,
    )
    try:
        yield RateLimits(state, deadline_seconds=30.0, most_local=10)
    finally:
        await state.close()


@pytest.fixture
async def limits(server: PrivateValkey, tmp_path: Path) -> AsyncIterator[RateLimits]:
    async with opened(server, tmp_path) as made:
        yield made


async def let_in(limits: RateLimits, tries: int, rates: Limits, route: str = ROUTE) -> int:
    """How many of so many requests at once are let in."""
    asked = (limits.admit("key", route, rates) for _ in range(tries))
    answers = await asyncio.gather(*asked, return_exceptions=True)
    assert all(isinstance(answer, dict | RateLimited) for answer in answers)
    return sum(isinstance(answer, dict) for answer in answers)


async def windows(server: PrivateValkey) -> dict[str, dict[int, int]]:
    """What is counted in Redis, by key and slice."""
    async with Redis.from_url(await server.start(), decode_responses=True) as redis:
        names: Any = await redis.keys("*")
        return {
            key: {int(at): int(count) for at, count in (await redis.hgetall(key)).items()}
            for key in names
        }


async def moved(server: PrivateValkey, slices: int) -> None:
    """Counts as they are after the server's clock went on by so many slices, or back."""
    found = await windows(server)
    async with Redis.from_url(await server.start()) as redis:
        for key, counts in found.items():
            await redis.delete(key)
            await redis.hset(key, mapping={str(at - slices): n for at, n in counts.items()})


async def test_no_more_are_let_in_than_the_limit_says(limits: RateLimits) -> None:
    assert await let_in(limits, 10, DAILY) == 3
    assert limits.counts.refused == 7
    assert limits.counts.local == 0


async def test_two_replicas_count_together(
    limits: RateLimits, server: PrivateValkey, tmp_path: Path
) -> None:
    async with opened(server, tmp_path) as other:
        assert await let_in(limits, 2, DAILY) == 2
        assert await let_in(other, 5, DAILY) == 1


async def test_each_key_and_each_route_counts_apart(limits: RateLimits) -> None:
    rates: Limits = {ROUTE: (Rate(1, 3600),), "/v1/guard": (Rate(2, 3600),)}
    assert await let_in(limits, 3, rates) == 1
    assert await let_in(limits, 3, rates, "/v1/guard") == 2
    await limits.admit("another key", ROUTE, rates)


async def test_a_route_without_a_limit_has_none(limits: RateLimits, server: PrivateValkey) -> None:
    assert await limits.admit("key", "/v1/models", {ROUTE: (Rate(1, 60),)}) == {}
    assert await windows(server) == {}


async def test_the_star_is_all_routes_together_and_beside_their_own(limits: RateLimits) -> None:
    rates: Limits = {"*": (Rate(3, 3600),), ROUTE: (Rate(2, 3600),)}
    assert await let_in(limits, 5, rates) == 2
    assert await let_in(limits, 5, rates, "/v1/guard") == 1


async def test_what_one_window_refuses_is_counted_in_none(
    limits: RateLimits, server: PrivateValkey
) -> None:
    rates: Limits = {"*": (Rate(1, 60), Rate(1000, 3600))}
    assert await let_in(limits, 9, rates) == 1
    assert [sum(counts.values()) for counts in (await windows(server)).values()] == [1, 1]


async def test_room_comes_back_when_the_window_has_passed_and_not_before(
    limits: RateLimits, server: PrivateValkey
) -> None:
    assert await let_in(limits, 3, DAILY) == 3
    await moved(server, SLICES - 1)
    assert await let_in(limits, 3, DAILY) == 0
    await moved(server, 2)
    assert await let_in(limits, 9, DAILY) == 3


async def test_a_clock_that_is_set_back_neither_frees_nor_locks_out(
    limits: RateLimits, server: PrivateValkey
) -> None:
    assert await let_in(limits, 3, DAILY) == 3
    await moved(server, -100 * SLICES)
    with pytest.raises(RateLimited) as refused:
        await limits.admit("key", ROUTE, DAILY)
    # No longer than a window and a slice.
    assert int(refused.value.headers()["retry-after"]) <= DAY + DAY / SLICES
    await moved(server, SLICES + 1)
    assert await let_in(limits, 9, DAILY) == 3


async def test_what_redis_holds_is_bounded_and_expires(
    limits: RateLimits, server: PrivateValkey
) -> None:
    for _ in range(SLICES + 30):
        await limits.admit("key", ROUTE, {"*": (Rate(1000, 3600),)})
        await moved(server, 1)
    await limits.admit("key", ROUTE, {"*": (Rate(1000, 3600),)})

    ((key, counts),) = (await windows(server)).items()
    assert len(counts) <= SLICES + 1
    assert key == "sg1:{limits:key}:*:3600"
    async with Redis.from_url(await server.start()) as redis:
        assert 3600 < await redis.ttl(key) <= 3600 * (SLICES + 2) / SLICES


async def test_what_is_left_is_told_as_openai_does(limits: RateLimits) -> None:
    rates: Limits = {"*": (Rate(2, 3600), Rate(1000, 86_400))}
    assert (await limits.admit("key", ROUTE, rates))["x-ratelimit-remaining-requests"] == "1"
    told = await limits.admit("key", ROUTE, rates)
    assert told["x-ratelimit-limit-requests"] == "2"
    assert told["x-ratelimit-remaining-requests"] == "0"
    assert told["x-ratelimit-reset-requests"].startswith("1h")

    with pytest.raises(RateLimited, match="2/hour") as refused:
        await limits.admit("key", ROUTE, rates)

    headers = refused.value.headers()
    assert 3500 < int(headers["retry-after"]) <= 3600 + 3600 / SLICES
    assert headers["x-ratelimit-remaining-requests"] == "0"
    assert refused.value.status == 429


async def test_a_limit_that_was_lowered_holds_for_what_was_sent_before(limits: RateLimits) -> None:
    assert await let_in(limits, 3, DAILY) == 3
    with pytest.raises(RateLimited) as refused:
        await limits.admit("key", ROUTE, {"*": (Rate(1, 86_400),)})
    assert refused.value.headers()["x-ratelimit-remaining-requests"] == "0"


async def test_without_its_server_each_replica_counts_by_itself(
    limits: RateLimits, server: PrivateValkey
) -> None:
    assert server.process_id is not None
    os.kill(server.process_id, signal.SIGKILL)

    assert await let_in(limits, 9, DAILY) == 3
    assert limits.counts.local == 9
    assert limits.counts.refused == 6


async def test_a_server_that_hangs_costs_no_more_than_the_deadline(
    server: PrivateValkey, tmp_path: Path
) -> None:
    state = await State.open(await server.start(), data_directory=tmp_path, command_seconds=60)
    limits = RateLimits(state, deadline_seconds=0.05)
    assert server.process_id is not None
    os.kill(server.process_id, signal.SIGSTOP)
    try:
        async with asyncio.timeout(20):
            assert await let_in(limits, 5, DAILY) == 3
        assert limits.counts.local == 5
    finally:
        os.kill(server.process_id, signal.SIGCONT)
        await state.close()


class TestLocal:
    @given(
        steps=st.lists(st.floats(0, 30), max_size=80),
        requests=st.integers(1, 5),
        seconds=st.integers(1, 60),
    )
    def test_in_no_time_of_a_window_more_are_let_in(
        self, steps: list[float], requests: int, seconds: int
    ) -> None:
        now = 0.0
        local = LocalWindows(10, lambda: now)
        rate = Rate(requests, seconds)
        passed: list[float] = []
        for step in steps:
            now += step
            (one,) = local.take([("key", rate)])
            recent = [at for at in passed if at > now - seconds]
            if one.retry_seconds == 0:
                passed.append(now)
                assert len(recent) < requests
            else:
                # Refused only where the window is full, give or take a slice.
                late = seconds + seconds / SLICES + 1e-5
                assert len([at for at in passed if at > now - late]) >= requests
                assert one.retry_seconds <= late

    @given(wait=st.floats(0, 1))
    def test_who_waits_as_long_as_told_is_let_in(self, wait: float) -> None:
        now = 0.0
        local = LocalWindows(10, lambda: now)
        local.take([("key", Rate(1, 60))])
        now = wait * 60
        (refused,) = local.take([("key", Rate(1, 60))])
        now += refused.retry_seconds + 1e-6
        (then,) = local.take([("key", Rate(1, 60))])
        assert then.retry_seconds == 0

    def test_the_least_used_make_room(self) -> None:
        local = LocalWindows(3, lambda: 0.0)
        for number in range(10):
            local.take([(f"key {number}", Rate(1, 60))])
        assert len(local) == 3
        (one,) = local.take([("key 9", Rate(1, 60))])
        assert one.retry_seconds > 0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0ms"),
        (0.0165, "17ms"),
        (1, "1s"),
        (59.2, "1m0s"),
        (360, "6m0s"),
        (3605, "1h0m5s"),
    ],
)
def test_durations_as_openai_writes_them(seconds: float, text: str) -> None:
    assert spoken(seconds) == text
