"""The tier of the verdict cache that replicas share, against a real server."""

import asyncio
import math
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis.asyncio import Redis

from models.inputs import GuardInput
from models.taxonomy import CATEGORIES, SIGNALS
from models.verdict import Coverage, Verdict, nothing
from service.batcher import Batcher
from service.private_valkey import PrivateValkey
from service.shared_verdicts import SharedVerdicts, decode, encode
from service.state import State
from service.verdict_cache import VerdictCache, keyed_digest
from tests.guards import CANARY, WordGuard
from tests.service.valkeys import cluster

digest = keyed_digest(b"key", "words-1")

probabilities = st.floats(0.0, 1.0) | st.sampled_from(
    [0.5, math.nextafter(0.5, 0), math.nextafter(0.5, 1)]
)
counts = st.integers(0, 2**63)
verdicts = st.builds(
    Verdict,
    st.sampled_from(["prompt", "response"]),
    st.tuples(probabilities, probabilities, probabilities),
    st.tuples(*[probabilities] * len(CATEGORIES)),
    st.tuples(*[probabilities] * len(SIGNALS)),
    st.builds(Coverage, counts, counts, counts),
)


class TestEncoding:
    @given(verdicts)
    def test_a_verdict_comes_back_as_it_was(self, verdict: Verdict) -> None:
        assert decode(encode(verdict)) == verdict

    def test_it_takes_little_room(self) -> None:
        assert len(encode(nothing("prompt"))) <= 240

    @given(st.binary(max_size=300))
    def test_what_nobody_encoded_is_a_miss(self, data: bytes) -> None:
        verdict = decode(data)
        assert verdict is None or encode(verdict) == data

    @pytest.mark.parametrize("place", [0, 1, 2, 3])
    def test_another_version_role_or_taxonomy_is_a_miss(self, place: int) -> None:
        data = bytearray(encode(nothing("prompt")))
        data[place] = 77
        assert decode(bytes(data)) is None

    @pytest.mark.parametrize("score", [math.nan, math.inf, -0.1, 1.1])
    def test_what_is_no_probability_is_a_miss(self, score: float) -> None:
        verdict = nothing("prompt")
        wrong = Verdict(
            verdict.role, (score, 0, 0), verdict.category_scores, verdict.signal_scores,
            verdict.coverage,
        )  # fmt: skip
        assert decode(encode(wrong)) is None


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[PrivateValkey]:
    valkey = PrivateValkey(tmp_path / "server", 64 * 2**20, stop_seconds=0.0)
    await valkey.start()
    yield valkey
    await valkey.stop()


class Replica:
    """A verdict cache with a guard of its own, and what it says of each look-up."""

    def __init__(self, guard: WordGuard, cache: VerdictCache, shared: SharedVerdicts) -> None:
        self.guard = guard
        self.cache = cache
        self.shared = shared
        self.seen: list[tuple[str, str]] = []

    async def judge(self, *texts: str) -> list[Verdict]:
        items = [GuardInput("prompt", text) for text in texts]
        verdicts = await self.cache.judge(items, [digest(item) for item in items])
        await self.shared.settled()
        return verdicts

    @property
    def judged(self) -> int:
        return sum(map(len, self.guard.batches))


@asynccontextmanager
async def replica(
    url: str, tmp_path: Path, *, wait: float = 10.0, quiet: float = 60.0, seconds: int = 60
) -> AsyncIterator[Replica]:
    state = await State.open(
        url,
        data_directory=tmp_path,
        setting="cache_url",
        may_evict=True,
        connect_seconds=1.0,
        command_seconds=15.0,
        probe_seconds=0.05,
    )
    guard = WordGuard()
    batcher = Batcher(guard, token_budget=4096, waiting_windows=1000, tokens_per_request=100_000)
    batcher.start()
    shared = SharedVerdicts(state, seconds, wait, quiet_seconds=quiet)
    seen: list[tuple[str, str]] = []
    made = Replica(
        guard,
        VerdictCache(batcher, 100, lambda tier, found: seen.append((tier, found)), shared),
        shared,
    )
    made.seen = seen
    try:
        async with asyncio.timeout(30):
            yield made
    finally:
        await batcher.close()
        await shared.close()
        await state.close()


@pytest.fixture
def paused(server: PrivateValkey) -> Iterator[None]:
    """Ends a pause that a test made."""
    yield
    if server.process_id is not None:
        os.kill(server.process_id, signal.SIGCONT)


def hang(server: PrivateValkey) -> None:
    assert server.process_id is not None
    os.kill(server.process_id, signal.SIGSTOP)


class TestSharing:
    async def test_what_one_replica_judged_the_other_knows(
        self, server: PrivateValkey, tmp_path: Path
    ) -> None:
        url = await server.start()
        async with replica(url, tmp_path) as one, replica(url, tmp_path) as other:
            first = await one.judge("severe-violence", "w1")
            again = await other.judge("w1", "severe-violence", "w2")

            assert again[:2] == first[::-1]
            assert again[1].categories == ("violence",)
            assert (one.judged, other.judged) == (2, 1)
            assert one.seen == [("local", "miss")] * 2 + [("redis", "miss")] * 2
            assert other.seen == [("local", "miss")] * 3 + [
                ("redis", "hit"), ("redis", "hit"), ("redis", "miss"),
            ]  # fmt: skip

    async def test_what_was_found_is_remembered_here(
        self, server: PrivateValkey, tmp_path: Path
    ) -> None:
        url = await server.start()
        async with replica(url, tmp_path) as one, replica(url, tmp_path) as other:
            await one.judge("w1")
            await other.judge("w1")
            other.seen.clear()
            await other.judge("w1")
            assert other.seen == [("local", "hit")]

    async def test_many_who_ask_for_the_same_ask_redis_once(
        self, server: PrivateValkey, tmp_path: Path
    ) -> None:
        async with replica(await server.start(), tmp_path) as one:
            await asyncio.gather(*(one.judge("w1") for _ in range(5)))
            assert one.seen.count(("redis", "miss")) == one.judged == 1

    async def test_it_expires_and_holds_no_text(
        self, server: PrivateValkey, tmp_path: Path
    ) -> None:
        url = await server.start()
        async with replica(url, tmp_path, seconds=50) as one, Redis.from_url(url) as redis:
            await one.judge(CANARY)
            (key,) = await redis.keys()
            assert key == f"sg1:verdict:{digest(GuardInput('prompt', CANARY)).hex()}".encode()
            assert 40 < await redis.ttl(key) <= 50
            kept = await redis.get(key)
            assert isinstance(kept, bytes)
            assert CANARY.encode() not in kept

    async def test_what_another_version_wrote_is_judged_and_written_over(
        self, server: PrivateValkey, tmp_path: Path
    ) -> None:
        url = await server.start()
        async with replica(url, tmp_path) as one, Redis.from_url(url) as redis:
            key = f"sg1:verdict:{digest(GuardInput('prompt', 'w1')).hex()}"
            await redis.set(key, b"\x09 of a later version")
            (verdict,) = await one.judge("w1")
            assert one.judged == 1
            kept = await redis.get(key)
            assert isinstance(kept, bytes)
            assert decode(kept) == verdict

    async def test_a_cluster_is_asked_for_keys_of_several_slots(self, tmp_path: Path) -> None:
        async with cluster(tmp_path, 2) as (node, _):
            url = f"redis+cluster://127.0.0.1:{node.port}"
            async with replica(url, tmp_path) as one, replica(url, tmp_path) as other:
                texts = [f"w{number}" for number in range(10)]
                first = await one.judge(*texts)
                assert await other.judge(*texts) == first
                assert (one.judged, other.judged) == (10, 0)


class TestFailures:
    async def test_a_server_that_is_not_there_is_a_miss(
        self, server: PrivateValkey, tmp_path: Path
    ) -> None:
        url = await server.start()
        await server.stop()
        async with replica(url, tmp_path) as one:
            assert [verdict.level.label for verdict in await one.judge("minor-drugs")] == ["minor"]
            assert one.seen == [("local", "miss"), ("redis", "error")]

    async def test_a_server_that_dies_is_a_miss(
        self, server: PrivateValkey, tmp_path: Path
    ) -> None:
        async with replica(await server.start(), tmp_path) as one:
            await one.judge("w1")
            await server.stop()
            await one.judge("w2")
            assert one.seen[-1] == ("redis", "error")
            assert one.judged == 2

    @pytest.mark.usefixtures("paused")
    async def test_one_that_hangs_is_waited_for_once_and_then_left_alone(
        self, server: PrivateValkey, tmp_path: Path
    ) -> None:
        async with replica(await server.start(), tmp_path, wait=0.3) as one:
            await one.judge("w1")
            hang(server)
            clock = asyncio.get_running_loop().time
            begun = clock()
            await one.cache.judge(
                [GuardInput("prompt", "w2")], [digest(GuardInput("prompt", "w2"))]
            )
            assert clock() - begun >= 0.3
            for number in range(3, 20):
                await one.judge(f"w{number}")
            # Each of them waiting would take five seconds.
            assert clock() - begun < 3.0
            assert one.seen.count(("redis", "error")) == 18

    @pytest.mark.usefixtures("paused")
    async def test_it_is_asked_again_after_a_while(
        self, server: PrivateValkey, tmp_path: Path
    ) -> None:
        async with replica(await server.start(), tmp_path, wait=0.3, quiet=0.1) as one:
            await one.judge("w1")
            hang(server)
            await one.cache.judge(
                [GuardInput("prompt", "w2")], [digest(GuardInput("prompt", "w2"))]
            )
            assert one.seen[-1] == ("redis", "error")
            assert server.process_id is not None
            os.kill(server.process_id, signal.SIGCONT)
            number = 3
            while one.seen[-1] == ("redis", "error"):
                await asyncio.sleep(0.02)
                await one.judge(f"w{number}")
                number += 1
            assert one.seen[-1] == ("redis", "miss")

    @pytest.mark.usefixtures("paused")
    async def test_what_waits_to_be_written_is_bounded(
        self, server: PrivateValkey, tmp_path: Path
    ) -> None:
        state = await State.open(await server.start(), data_directory=tmp_path)
        shared = SharedVerdicts(state, 60, most_waiting=10)
        hang(server)
        shared.put((bytes([number]) * 32, nothing("prompt")) for number in range(25))
        assert shared.dropped == 15
        await shared.close()
        await state.close()
