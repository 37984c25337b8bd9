"""The circuit breaker: when calls pass, on a clock of the test's own."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.breaker import Breaker

FAILURES, SECONDS = 3, 10.0


def opened(at: float = 0.0) -> Breaker:
    breaker = Breaker(FAILURES, SECONDS)
    for _ in range(FAILURES):
        breaker.failed(at)
    return breaker


class TestClosed:
    def test_calls_pass_at_first_and_while_fewer_fail(self) -> None:
        breaker = Breaker(FAILURES, SECONDS)
        for _ in range(FAILURES - 1):
            assert breaker.remaining(0.0) == 0
            breaker.failed(0.0)
        assert breaker.remaining(0.0) == 0
        assert breaker.is_closed

    def test_a_success_between_failures_begins_the_count_anew(self) -> None:
        breaker = Breaker(FAILURES, SECONDS)
        for _ in range(5):
            for _ in range(FAILURES - 1):
                breaker.failed(0.0)
            breaker.succeeded()
        assert breaker.is_closed

    def test_any_number_of_calls_pass_at_once(self) -> None:
        breaker = Breaker(FAILURES, SECONDS)
        assert [breaker.remaining(0.0) for _ in range(100)] == [0] * 100

    def test_what_was_abandoned_is_no_failure(self) -> None:
        breaker = Breaker(1, SECONDS)
        breaker.abandoned()
        assert breaker.is_closed


class TestOpen:
    def test_it_says_how_long_it_stays_so(self) -> None:
        breaker = opened(at=100.0)
        assert not breaker.is_closed
        assert [breaker.remaining(now) for now in (100.0, 104.0, 109.5)] == [10.0, 6.0, 0.5]

    def test_then_one_call_a_second_passes_as_a_trial(self) -> None:
        breaker = opened()
        assert breaker.remaining(SECONDS) == 0
        assert breaker.remaining(SECONDS) > 0
        assert breaker.remaining(SECONDS + 0.5) == 0.5
        assert breaker.remaining(SECONDS + 1) == 0
        assert breaker.remaining(SECONDS + 1) > 0
        assert not breaker.is_closed

    def test_a_trial_that_succeeds_closes_it(self) -> None:
        breaker = opened()
        breaker.remaining(SECONDS)
        breaker.succeeded()
        assert breaker.is_closed
        # And all of the failures are needed again.
        breaker.failed(SECONDS)
        assert breaker.is_closed

    def test_a_trial_that_fails_opens_it_for_as_long_again(self) -> None:
        breaker = opened()
        breaker.remaining(SECONDS)
        breaker.failed(12.0)
        assert breaker.remaining(12.0) == SECONDS
        assert breaker.remaining(12.0 + SECONDS) == 0

    def test_a_trial_that_was_abandoned_lets_another_pass_at_once(self) -> None:
        breaker = opened()
        breaker.remaining(SECONDS)
        breaker.abandoned()
        assert breaker.remaining(SECONDS) == 0

    def test_an_older_call_that_is_answered_after_all_closes_it(self) -> None:
        breaker = opened()
        breaker.succeeded()
        assert breaker.is_closed


@pytest.mark.parametrize("failures", [1, 2, 5])
@given(st.lists(st.sampled_from(["succeeded", "failed", "abandoned", "wait"]), max_size=40))
def test_it_is_open_only_after_that_many_failures_in_a_row_and_never_for_good(
    failures: int, events: list[str]
) -> None:
    breaker, now, row = Breaker(failures, SECONDS), 0.0, 0
    for event in events:
        if event == "wait":
            now += SECONDS
            continue
        if breaker.remaining(now) > 0:
            continue
        if event == "failed":
            breaker.failed(now)
            row += 1
        elif event == "succeeded":
            breaker.succeeded()
            row = 0
        else:
            breaker.abandoned()
        assert breaker.is_closed == (row < failures)
    assert breaker.remaining(now + SECONDS) == 0
