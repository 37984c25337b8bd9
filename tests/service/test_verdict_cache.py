"""The verdict cache: what was judged is not judged again, through the real batcher."""

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.guard import Logits
from models.inputs import GuardInput, Speaker, Turn, Window
from models.verdict import Verdict
from service.batcher import Batcher
from service.errors import GuardUnavailable, Overloaded
from service.verdict_cache import Found, Tier, VerdictCache, keyed_digest
from tests.guards import BrokenGuard, SlowGuard, WordGuard

digest = keyed_digest(b"key", "words-1")


class FailsOnce(SlowGuard):
    """Fails on its first batch."""

    def score(self, windows: Sequence[Window]) -> Logits:
        logits = super().score(windows)
        if len(self.batches) == 1:
            raise RuntimeError("out of memory")
        return logits


@asynccontextmanager
async def caching(
    guard: WordGuard, most: int = 100, seen: list[bool] | None = None, waiting: int = 10_000
) -> AsyncIterator[VerdictCache]:
    def observe(tier: Tier, found: Found) -> None:
        assert tier == "local"
        if seen is not None:
            seen.append(found == "hit")

    batcher = Batcher(guard, token_budget=4096, waiting_windows=waiting, tokens_per_request=100_000)
    batcher.start()
    try:
        async with asyncio.timeout(20):
            yield VerdictCache(batcher, most, observe)
    finally:
        await batcher.close()


def prompt(text: str, *context: str) -> GuardInput:
    return GuardInput("prompt", text, tuple(Turn("user", said) for said in context))


async def judge(cache: VerdictCache, *items: GuardInput, is_answer: bool = False) -> list[Verdict]:
    return await cache.judge(items, [digest(item) for item in items], is_answer=is_answer)


def judged(guard: WordGuard) -> list[str]:
    """All texts that reached the guard, in their order."""
    return [" ".join(guard.words(window)[1:]) for batch in guard.batches for window in batch]


def levels(verdicts: Sequence[Verdict]) -> list[str]:
    return [verdict.level.label for verdict in verdicts]


@pytest.fixture
def slow() -> Iterator[SlowGuard]:
    guard = SlowGuard()
    yield guard
    guard.let_go()


async def entered(guard: SlowGuard) -> None:
    await asyncio.to_thread(guard.wait_until_entered)


class TestRemembering:
    async def test_a_text_is_judged_once(self) -> None:
        guard, seen = WordGuard(), list[bool]()
        async with caching(guard, seen=seen) as cache:
            first = await judge(cache, prompt("w1"), prompt("minor-drugs"))
            again = await judge(cache, prompt("minor-drugs"), prompt("w2"), prompt("w1"))
        assert sorted(judged(guard)) == ["minor-drugs", "w1", "w2"]
        assert again == [first[1], again[1], first[0]]
        assert levels(again) == ["minor", "none", "none"]
        assert seen == [False, False, True, False, True]

    async def test_the_same_text_twice_in_a_request_is_judged_once(self) -> None:
        guard = WordGuard()
        async with caching(guard) as cache:
            verdicts = await judge(
                cache, prompt("minor-drugs"), prompt("w1"), prompt("minor-drugs")
            )
        assert levels(verdicts) == ["minor", "none", "minor"]
        assert len(judged(guard)) == 2

    async def test_nothing_to_judge_is_nothing(self) -> None:
        async with caching(WordGuard()) as cache:
            assert await judge(cache) == []

    async def test_role_and_context_are_part_of_what_was_judged(self) -> None:
        guard = WordGuard()
        asked = [
            prompt("w1"),
            GuardInput("response", "w1"),
            prompt("w1", "w2"),
            prompt("w1", "w2", "w3"),
            GuardInput("prompt", "w1", (Turn("assistant", "w2"),)),
        ]
        async with caching(guard) as cache:
            for item in asked:
                await judge(cache, item)
            assert len(cache) == len(judged(guard)) == len(asked)
            await judge(cache, *asked)
        assert len(judged(guard)) == len(asked)

    async def test_no_more_than_so_many_are_kept_the_latest_used(self) -> None:
        guard = WordGuard()
        async with caching(guard, most=2) as cache:
            for text in ("w1", "w2", "w1", "w3"):
                await judge(cache, prompt(text))
            assert len(cache) == 2
            guard.batches.clear()
            await judge(cache, prompt("w1"), prompt("w3"))
            assert judged(guard) == []
            await judge(cache, prompt("w2"))
            assert judged(guard) == ["w2"]

    async def test_zero_turns_it_off(self) -> None:
        guard = WordGuard()
        async with caching(guard, most=0) as cache:
            for _ in range(3):
                assert levels(await judge(cache, prompt("minor-drugs"))) == ["minor"]
            assert len(cache) == 0
        assert judged(guard) == ["minor-drugs"] * 3

    async def test_a_failure_is_not_remembered(self) -> None:
        guard = BrokenGuard()
        async with caching(guard) as cache:
            for text in ("poison", "rotten"):
                for _ in range(2):
                    with pytest.raises(GuardUnavailable):
                        await judge(cache, prompt(text), prompt("w1"))
            assert levels(await judge(cache, prompt("w1"))) == ["none"]
            assert len(cache) == 1
        assert sum("poison" in text for text in judged(guard)) >= 2
        assert sum("rotten" in text for text in judged(guard)) >= 2


class TestFlights:
    async def test_what_is_being_judged_is_waited_for(self, slow: SlowGuard) -> None:
        async with caching(slow) as cache:
            first = asyncio.create_task(judge(cache, prompt("minor-drugs")))
            await entered(slow)
            others = [
                asyncio.create_task(judge(cache, prompt("minor-drugs"), prompt("w1")))
                for _ in range(4)
            ]
            await asyncio.sleep(0)
            slow.let_go()
            assert levels(await first) == ["minor"]
            for verdicts in await asyncio.gather(*others):
                assert levels(verdicts) == ["minor", "none"]
        assert sorted(judged(slow)) == ["minor-drugs", "w1"]

    async def test_a_first_caller_that_goes_away_does_not_fail_the_second(
        self, slow: SlowGuard
    ) -> None:
        async with caching(slow) as cache:
            first = asyncio.create_task(judge(cache, prompt("minor-drugs")))
            await entered(slow)
            second = asyncio.create_task(judge(cache, prompt("minor-drugs")))
            await asyncio.sleep(0)
            first.cancel()
            slow.let_go()
            assert levels(await second) == ["minor"]
            assert first.cancelled()
            assert levels(await judge(cache, prompt("minor-drugs"))) == ["minor"]
        assert judged(slow) == ["minor-drugs"] * 2

    async def test_of_many_who_waited_for_one_that_went_away_one_begins_anew(
        self, slow: SlowGuard
    ) -> None:
        texts = [prompt("minor-drugs"), prompt("w1"), prompt("w2")]
        async with caching(slow) as cache:
            first = asyncio.create_task(judge(cache, *texts))
            await entered(slow)
            others = [asyncio.create_task(judge(cache, *texts)) for _ in range(5)]
            await asyncio.sleep(0)
            first.cancel()
            slow.let_go()
            for verdicts in await asyncio.gather(*others):
                assert levels(verdicts) == ["minor", "none", "none"]
        assert sorted(judged(slow)) == sorted(["minor-drugs", "w1", "w2"] * 2)

    async def test_a_second_caller_that_goes_away_does_not_fail_the_others(
        self, slow: SlowGuard
    ) -> None:
        async with caching(slow) as cache:
            first = asyncio.create_task(judge(cache, prompt("minor-drugs")))
            await entered(slow)
            second, third = (
                asyncio.create_task(judge(cache, prompt("minor-drugs"))) for _ in range(2)
            )
            await asyncio.sleep(0)
            second.cancel()
            slow.let_go()
            assert levels(await first) == levels(await third) == ["minor"]
            assert second.cancelled()
        assert judged(slow) == ["minor-drugs"]

    async def test_a_first_caller_that_fails_leaves_the_second_its_own_try(self) -> None:
        guard = FailsOnce()
        async with caching(guard) as cache:
            first = asyncio.create_task(judge(cache, prompt("minor-drugs")))
            await entered(guard)
            second = asyncio.create_task(judge(cache, prompt("minor-drugs")))
            await asyncio.sleep(0)
            guard.let_go()
            with pytest.raises(GuardUnavailable):
                await first
            assert levels(await second) == ["minor"]
        assert judged(guard) == ["minor-drugs"] * 2

    async def test_an_answer_does_not_wait_for_room(self, slow: SlowGuard) -> None:
        async with caching(slow, waiting=1) as cache:
            busy = asyncio.create_task(judge(cache, prompt("w0")))
            await entered(slow)
            waits = asyncio.create_task(judge(cache, prompt("w1")))
            await asyncio.sleep(0)
            with pytest.raises(Overloaded):
                await judge(cache, prompt("w2"))
            answer = asyncio.create_task(judge(cache, prompt("w2"), is_answer=True))
            await asyncio.sleep(0)
            slow.let_go()
            assert levels(await answer) == ["none"]
            await asyncio.gather(busy, waits)


speakers = st.sampled_from(["user", "assistant", "system", "tool"])
words = st.text(st.sampled_from("a\x00,1é\ud800"), max_size=4)


def turn(speaker: Speaker, text: str) -> Turn:
    return Turn(speaker, text)


items = st.builds(
    GuardInput,
    st.sampled_from(["prompt", "response"]),
    words,
    st.lists(st.builds(turn, speakers, words), max_size=3).map(tuple),
)


class TestDigests:
    @given(items, items)
    def test_they_are_the_same_only_for_the_same(self, one: GuardInput, other: GuardInput) -> None:
        assert (digest(one) == digest(other)) == (one == other)

    def test_another_key_or_guard_gives_another(self) -> None:
        made = {
            keyed_digest(key, guard)(prompt("w1"))
            for key in (b"key", b"other")
            for guard in ("words-1", "words-2")
        }
        assert len(made) == 4

    def test_parts_that_only_join_alike_differ(self) -> None:
        assert digest(prompt("a\x00user", "b")) != digest(prompt("a", "user\x00b"))
