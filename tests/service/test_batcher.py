"""Batches: many callers share the guard, and none of them can spoil it for the others."""

import asyncio
import gc
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models import guard as guards
from models.guard import Logits
from models.inputs import GuardInput, Turn, Window
from models.taxonomy import Severity
from models.verdict import Verdict
from service.batcher import Batcher
from service.errors import GuardUnavailable, Overloaded, TooLarge
from tests.guards import CANARY, BrokenGuard, SlowGuard, WordGuard

BUDGET = 4096


def prompt(text: str) -> GuardInput:
    return GuardInput("prompt", text)


def levels(verdicts: Sequence[Verdict]) -> list[str]:
    return [verdict.level.label for verdict in verdicts]


@asynccontextmanager
async def running(guard: WordGuard, **changes: Any) -> AsyncIterator[Batcher]:
    """A batcher at work, with limits that are out of the way unless ``changes`` say."""
    limits: dict[str, Any] = {
        "token_budget": BUDGET,
        "waiting_windows": 10_000,
        "tokens_per_request": 1_000_000,
    }
    batcher = Batcher(guard, **limits | changes)
    batcher.start()
    try:
        async with asyncio.timeout(20):
            yield batcher
    finally:
        await batcher.close()


@pytest.fixture
def slow() -> Iterator[SlowGuard]:
    guard = SlowGuard()
    yield guard
    guard.let_go()


async def entered(guard: SlowGuard) -> None:
    await asyncio.to_thread(guard.wait_until_entered)


async def until(reached: Callable[[], bool]) -> None:
    # What is waited for has no event of its own.
    while not reached():  # noqa: ASYNC110 - there is none
        await asyncio.sleep(0)


def texts(guard: WordGuard, batch: Sequence[Window]) -> list[str]:
    """What a batch's windows say, without their role."""
    return [" ".join(guard.words(window)[1:]) for window in batch]


class TestSharing:
    async def test_what_waits_together_is_judged_together(self, slow: SlowGuard) -> None:
        async with running(slow) as batcher:
            first = asyncio.create_task(batcher.judge([prompt("w0")]))
            await entered(slow)
            rest = [asyncio.create_task(batcher.judge([prompt(f"w{n}")])) for n in range(1, 9)]
            await until(lambda: batcher.waiting == 8)
            slow.let_go()
            await asyncio.gather(first, *rest)
        assert [texts(slow, batch) for batch in slow.batches] == [
            ["w0"],
            [f"w{n}" for n in range(1, 9)],
        ]

    async def test_requests_that_are_ready_at_once_share_even_the_first_batch(self) -> None:
        guard = WordGuard()
        async with running(guard) as batcher:
            await asyncio.gather(*(batcher.judge([prompt(f"w{n}")]) for n in range(5)))
        assert [len(batch) for batch in guard.batches] == [5]

    async def test_each_caller_gets_its_own_verdicts_in_its_order(self) -> None:
        asked = [[f"{level.label}-drugs" if level else "w1" for level in Severity]] * 3
        async with running(WordGuard()) as batcher:
            answers = await asyncio.gather(*(batcher.judge([*map(prompt, one)]) for one in asked))
        assert [levels(one) for one in answers] == [["none", "minor", "moderate", "severe"]] * 3

    async def test_nothing_to_judge_needs_no_guard(self) -> None:
        guard = WordGuard()
        async with running(guard) as batcher:
            assert await batcher.judge([]) == []
        assert not guard.batches

    async def test_windows_of_like_length_share_a_batch(self, slow: SlowGuard) -> None:
        long, short = "w1 " * 200, "w2"
        async with running(slow, token_budget=1024) as batcher:
            first = asyncio.create_task(batcher.judge([prompt("w0")]))
            await entered(slow)
            rest = asyncio.create_task(
                batcher.judge([*[prompt(long), prompt(short)] * 4, *[prompt(short)] * 36])
            )
            await until(lambda: batcher.waiting == 44)
            slow.let_go()
            await asyncio.gather(first, rest)
        shapes = [sorted({len(window) for window in batch}) for batch in slow.batches]
        assert sorted(map(tuple, shapes)) == [(4,), (4,), (203,)]
        assert sorted(map(len, slow.batches)) == [1, 4, 40]

    async def test_a_batch_is_reported_with_its_size(self) -> None:
        seen: list[tuple[int, int]] = []
        async with running(
            WordGuard(), observe_batch=lambda rows, tokens, _: seen.append((rows, tokens))
        ) as batcher:
            await batcher.judge([prompt("w1"), prompt("w1 w2 w3")])
        assert seen == [(2, 2 * 6)]

    @settings(max_examples=25, deadline=None)
    @given(st.data())
    def test_verdicts_are_those_of_judging_one_by_one_within_the_budget(
        self, data: st.DataObject
    ) -> None:
        budget = data.draw(st.integers(256, 2048))
        words = st.sampled_from(
            ["w1", "w2", "minor-drugs", "severe-violence", "☂", "signal-minors"]
        )
        text = st.builds(
            lambda word, n, end: f"{word} " * n + end, words, st.integers(0, 700), words
        )
        context = st.sampled_from([(), (Turn("user", "severe-violence"),)])
        item = st.builds(GuardInput, st.sampled_from(["prompt", "response"]), text, context)
        callers = data.draw(st.lists(st.lists(item, max_size=4), min_size=1, max_size=5))
        guard = WordGuard()

        async def shared() -> list[list[Verdict]]:
            async with running(guard, token_budget=budget) as batcher:
                return await asyncio.gather(*map(batcher.judge, callers))

        answers = asyncio.run(shared())
        for batch in guard.batches:
            assert len(batch) == 1 or len(batch) * max(map(len, batch)) <= budget
        alone = WordGuard()
        assert answers == [
            [verdict for item in items for verdict in guards.judge(alone, [item])]
            for items in callers
        ]


class TestFairness:
    async def test_a_long_text_does_not_keep_short_ones_waiting(self, slow: SlowGuard) -> None:
        async with running(slow) as batcher:
            long = asyncio.create_task(batcher.judge([prompt("w1 " * 50_000)]))
            await entered(slow)
            short = asyncio.create_task(batcher.judge([prompt("minor-drugs")]))
            await until(lambda: len(batcher._jobs) == 2)
            # The batch at work, one more of the long text at most, then the short one's.
            for _ in range(3):
                slow.step()
            assert levels(await short) == ["minor"]
            assert not long.done()
            slow.let_go()
            (verdict,) = await long
        assert verdict.coverage.windows > 200

    async def test_encoding_a_long_text_leaves_the_loop_to_others(self) -> None:
        guard, gaps, is_done = WordGuard(), [0.0], False

        async def others() -> None:
            last = time.perf_counter()
            while not is_done:
                await asyncio.sleep(0)
                gaps.append(time.perf_counter() - last)
                last += gaps[-1]

        async with running(guard, tokens_per_request=1) as batcher:
            task = asyncio.create_task(others())
            await asyncio.sleep(0)
            with pytest.raises(TooLarge):
                await batcher.judge([prompt("w1 " * 100_000)])
            is_done = True
            await task
        # A share, not a time: no other task stood still for most of it.
        assert max(gaps) < sum(gaps) / 2

    async def test_encoding_many_texts_leaves_the_loop_to_others(self) -> None:
        turns, is_done = 0, False

        async def others() -> None:
            nonlocal turns
            while not is_done:
                await asyncio.sleep(0)
                turns += 1

        async with running(WordGuard(), tokens_per_request=1) as batcher:
            task = asyncio.create_task(others())
            with pytest.raises(TooLarge):
                await batcher.judge([prompt("w1 w2 w3")] * 5000)
            is_done = True
            await task
        assert turns > 10


class TestPoison:
    async def test_it_fails_alone(self) -> None:
        guard = BrokenGuard()
        asked = ["w1", "poison", "severe-violence", "rotten", "minor-drugs"]
        async with running(guard) as batcher:
            answers = await asyncio.gather(
                *(batcher.judge([prompt(text)]) for text in asked), return_exceptions=True
            )
        assert len(guard.batches[0]) == 5
        shown = [
            type(one).__name__ if isinstance(one, BaseException) else one[0].level.label
            for one in answers
        ]
        assert shown == ["none", "GuardUnavailable", "severe", "GuardUnavailable", "minor"]

    async def test_a_request_that_holds_it_fails_whole_and_without_its_text(self) -> None:
        async with running(BrokenGuard()) as batcher:
            for text in ("poison", "rotten"):
                with pytest.raises(GuardUnavailable) as failed:
                    await batcher.judge([prompt("w1"), prompt(f"{CANARY} {text}")])
                assert CANARY not in failed.value.message

    async def test_a_long_text_that_holds_it_does_not_hold_up_others(self) -> None:
        async with running(BrokenGuard()) as batcher:
            poisoned = batcher.judge([prompt("w1 " * 10_000 + "poison")])
            fine = batcher.judge([prompt("w1 " * 10_000 + "minor-drugs")])
            failed, answer = await asyncio.gather(poisoned, fine, return_exceptions=True)
            assert isinstance(failed, GuardUnavailable)
            assert not isinstance(answer, BaseException)
            assert levels(answer) == ["minor"]
            assert batcher.waiting == 0

    async def test_the_guard_goes_on_after_it(self) -> None:
        async with running(BrokenGuard()) as batcher:
            for _ in range(3):
                with pytest.raises(GuardUnavailable):
                    await batcher.judge([prompt("poison")])
            assert levels(await batcher.judge([prompt("minor-drugs")])) == ["minor"]

    async def test_two_failures_of_one_request_leave_no_exception_that_nobody_took(self) -> None:
        """The event loop would log it with its traceback, which may hold a client's text."""
        untaken: list[Any] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, found: untaken.append(found))

        async def fails(batcher: Batcher) -> bool:
            # The second fails before the first, which is what the caller waits for.
            try:
                await batcher.judge([prompt("w1 " * 20_000 + "poison"), prompt("poison")])
            except GuardUnavailable:
                return True
            return False

        async with running(BrokenGuard()) as batcher:
            assert await fails(batcher)
        gc.collect()
        assert not untaken

    async def test_a_guard_of_the_wrong_shape_fails_the_batch_and_not_the_batcher(self) -> None:
        class Short(WordGuard):
            def score(self, windows: Sequence[Window]) -> Logits:
                return super().score(windows)[1:]

        guard = Short()
        async with running(guard) as batcher, asyncio.timeout(5):
            for _ in range(2):
                with pytest.raises(GuardUnavailable):
                    await batcher.judge([prompt("w1")])


class TestLeaving:
    async def test_a_caller_that_left_is_dropped_before_it_is_judged(self, slow: SlowGuard) -> None:
        async with running(slow) as batcher:
            first = asyncio.create_task(batcher.judge([prompt("w0")]))
            await entered(slow)
            leaving = asyncio.create_task(batcher.judge([prompt("w1"), prompt("w2 " * 1000)]))
            staying = asyncio.create_task(batcher.judge([prompt("w3")]))
            await until(lambda: batcher.waiting > 2)
            leaving.cancel()
            slow.let_go()
            await asyncio.gather(first, staying)
            assert leaving.cancelled()
            assert batcher.waiting == 0
        assert [texts(slow, batch) for batch in slow.batches] == [["w0"], ["w3"]]

    async def test_a_caller_that_leaves_while_it_is_judged_harms_nobody(
        self, slow: SlowGuard
    ) -> None:
        async with running(slow) as batcher:
            leaving = asyncio.create_task(batcher.judge([prompt("w1 " * 20_000)]))
            staying = asyncio.create_task(batcher.judge([prompt("minor-drugs " * 300)]))
            await entered(slow)
            leaving.cancel()
            slow.let_go()
            assert levels(await staying) == ["minor"]
            assert batcher.waiting == 0


class TestLimits:
    async def test_more_than_may_wait_is_refused_before_it_is_judged(self, slow: SlowGuard) -> None:
        async with running(slow, waiting_windows=3) as batcher:
            first = asyncio.create_task(batcher.judge([prompt("w0")]))
            await entered(slow)
            second = asyncio.create_task(batcher.judge([prompt("w1"), prompt("w2")]))
            await until(lambda: batcher.waiting == 2)
            with pytest.raises(Overloaded):
                await batcher.judge([prompt("w3"), prompt("w4")])
            third = asyncio.create_task(batcher.judge([prompt("w5")]))
            await until(lambda: batcher.waiting == 3)
            slow.let_go()
            await asyncio.gather(first, second, third)
            assert batcher.waiting == 0
            await batcher.judge([prompt("w6")])
        words = {text for batch in slow.batches for text in texts(slow, batch)}
        assert words == {"w0", "w1", "w2", "w5", "w6"}

    async def test_what_was_paid_for_already_needs_no_room(self, slow: SlowGuard) -> None:
        async with running(slow, waiting_windows=1) as batcher:
            asked = [asyncio.create_task(batcher.judge([prompt("w0")]))]
            await entered(slow)
            asked.append(asyncio.create_task(batcher.judge([prompt("w1")])))
            await until(lambda: batcher.waiting == 1)
            asked.append(asyncio.create_task(batcher.judge([prompt("w2")], is_answer=True)))
            await until(lambda: batcher.waiting == 2)
            slow.let_go()
            assert len(await asyncio.gather(*asked)) == 3

    async def test_pieces_of_answers_go_before_prompts_that_came_earlier(
        self, slow: SlowGuard
    ) -> None:
        async with running(slow, token_budget=256) as batcher:
            asked = [asyncio.create_task(batcher.judge([prompt("w0")]))]
            await entered(slow)
            asked += [asyncio.create_task(batcher.judge([prompt("w1 " * 200)])) for _ in range(2)]
            await until(lambda: batcher.waiting == 2)
            piece = prompt("w2 " * 200)
            asked.append(asyncio.create_task(batcher.judge([piece], is_answer=True)))
            await until(lambda: batcher.waiting == 3)
            slow.let_go()
            await asyncio.gather(*asked)
        assert [texts(slow, batch)[0][:2] for batch in slow.batches] == ["w0", "w2", "w1", "w1"]

    async def test_a_long_answer_takes_turns_with_prompts(self, slow: SlowGuard) -> None:
        async with running(slow, token_budget=256) as batcher:
            asked = [asyncio.create_task(batcher.judge([prompt("w0")]))]
            await entered(slow)
            long = prompt("w2 " * 3000)
            asked.append(asyncio.create_task(batcher.judge([long], is_answer=True)))
            await until(lambda: batcher.waiting > 4)
            asked.append(asyncio.create_task(batcher.judge([prompt("w1 " * 200)])))
            slow.let_go()
            await asyncio.gather(*asked)
        firsts = [texts(slow, batch)[0][:2] for batch in slow.batches]
        assert firsts[:3] == ["w0", "w2", "w1"]

    async def test_a_request_of_more_than_may_wait_is_judged_where_nothing_waits(self) -> None:
        async with running(WordGuard(), waiting_windows=1) as batcher:
            (verdict,) = await batcher.judge([prompt("w1 " * 1000 + "minor-drugs")])
        assert verdict.coverage.windows > 1
        assert verdict.level is Severity.MINOR

    async def test_more_tokens_than_a_request_may_have_are_refused_unjudged(self) -> None:
        guard = WordGuard()
        async with running(guard, tokens_per_request=100) as batcher:
            with pytest.raises(TooLarge, match="100 are judged") as refused:
                await batcher.judge([prompt("w1 " * 60)] * 2)
            assert refused.value.code == "too_many_tokens"
            await batcher.judge([prompt("w1 " * 60)])
        assert len(guard.batches) == 1


class TestClosing:
    async def test_who_still_waits_is_told(self, slow: SlowGuard) -> None:
        async with running(slow) as batcher:
            asked = [asyncio.create_task(batcher.judge([prompt("w0")]))]
            await entered(slow)
            asked.append(asyncio.create_task(batcher.judge([prompt("w1 " * 1000)])))
            await until(lambda: batcher.waiting > 0)
            await batcher.close()
            for one in asked:
                with pytest.raises(GuardUnavailable, match="stopping"):
                    await one

    async def test_closing_twice_or_unstarted_does_nothing(self) -> None:
        batcher = Batcher(WordGuard(), token_budget=BUDGET, waiting_windows=1, tokens_per_request=1)
        await batcher.close()
        await batcher.close()

    async def test_who_comes_after_is_told_too(self) -> None:
        async with running(WordGuard()) as batcher:
            await batcher.close()
            with pytest.raises(GuardUnavailable):
                async with asyncio.timeout(5):
                    await batcher.judge([prompt("w1")])
