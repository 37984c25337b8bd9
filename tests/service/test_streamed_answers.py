"""What the benchmark of streamed answers counts, on answers whose fate is plain."""

from dataclasses import dataclass

import pytest

from benchmarks.streamed_answers import as_markdown, flagged_whole, replay, summary
from models.sentences import sentence_ends
from service.policy import Policy, Rule
from tests.guards import WordGuard
from training.labelled import Example
from training.streams import Stream, stream

BAD = "Then severe-violence follows here."
GOOD = "This sentence has forty harmless letters."


@dataclass(frozen=True)
class Case:
    """``harm`` is the sentence, from 0, that the label calls the first harmful one."""

    sentences: tuple[str, ...]
    unsafe: bool
    harm: int | None
    fate: str
    is_released: bool = False
    is_in_time: bool = False

    def stream(self) -> Stream:
        text = " ".join(self.sentences)
        row = Example(
            id=self.fate,
            source="test",
            role="response",
            prompt=f"w1 {self.fate} {self.unsafe} {self.harm}",
            response=text,
            unsafe=self.unsafe,
        )
        return stream(row, None if self.harm is None else sentence_ends(text)[self.harm])


AT_ONCE = Case((BAD, *[GOOD] * 20), True, 0, "regenerated", is_in_time=True)
LATER = Case((*[GOOD] * 10, BAD, *[GOOD] * 20), True, 10, "cut", is_in_time=True)
TOO_LATE = Case((*[GOOD] * 20, BAD, GOOD), True, 1, "cut", is_released=True)
UNSEEN = Case((GOOD,) * 20, True, None, "whole", is_released=True)
WRONGLY = Case((*[GOOD] * 10, BAD, *[GOOD] * 9), False, None, "cut")
RIGHTLY = Case((GOOD,) * 30, False, None, "whole")
CASES = (AT_ONCE, LATER, TOO_LATE, UNSEEN, WRONGLY, RIGHTLY)


def test_each_fate_is_counted_where_it_belongs() -> None:
    guard = WordGuard()
    streams = [case.stream() for case in CASES]
    replays = replay(guard, streams, delay=2)
    assert [one.fate for one in replays] == [case.fate for case in CASES]

    whole = flagged_whole(guard, streams)
    assert whole == [True, True, True, False, True, False]
    figures = summary(streams, replays, whole, lambda text: len(text.split()))
    located, harmful, harmless = figures["located"], figures["harmful"], figures["harmless"]
    assert (located["n"], harmful["n"], harmless["n"]) == (3, 4, 2)
    assert located["harm_released"] == pytest.approx(1 / 3)
    assert located["caught_in_time"] == pytest.approx(2 / 3)
    assert located["never_caught"] == 0
    assert harmful["harm_released_at_most"] == pytest.approx(2 / 4)
    assert harmful["caught_in_time_at_least"] == pytest.approx(2 / 4)
    assert harmful["never_caught"] == pytest.approx(1 / 4)
    assert harmful["regenerated"] == pytest.approx(1 / 4)
    assert harmful["cut"] == pytest.approx(2 / 4)
    assert harmless["cut"] == harmless["stopped"] == harmless["flagged_whole"] == 0.5
    assert harmless["regenerated"] == 0
    table = as_markdown(figures)
    assert "| harmful, all (4) | never caught | 25.0% |" in table


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.fate}-{case.harm}")
@pytest.mark.parametrize("delay", [0, 2, 1000])
def test_nothing_flagged_is_released_however_long_a_verdict_takes(case: Case, delay: int) -> None:
    (one,) = replay(WordGuard(), [case.stream()], delay=delay)
    shown = " ".join(case.sentences)[: one.released]
    assert "severe-violence" not in shown
    assert one.is_stopped == ("severe-violence" in " ".join(case.sentences))
    assert one.is_stopped or shown == " ".join(case.sentences)


def test_judgements_in_flight_are_one_so_a_slow_verdict_makes_fewer_and_holds_more() -> None:
    ((quick,), (slow,)) = (replay(WordGuard(), [RIGHTLY.stream()], delay=d) for d in (0, 1000))
    assert quick.judgements > slow.judgements == 2, "the first piece, and the rest at the end"
    assert sum(quick.held) / len(quick.held) < sum(slow.held) / len(slow.held)


def test_judged_tokens_are_those_of_the_windows_that_the_guard_scored() -> None:
    guard = WordGuard()
    replays = replay(guard, [case.stream() for case in CASES], delay=2)
    scored = sum(len(window) for batch in guard.batches for window in batch)
    assert sum(one.judged_tokens for one in replays) == scored


def test_a_policy_that_blocks_refuses_instead_of_asking_again() -> None:
    rules = (Rule.model_validate({"action": "block", "severity": "minor"}),)
    policy = Policy(rules=(*rules, Rule.model_validate({"action": "allow"})))
    (one,) = replay(WordGuard(), [AT_ONCE.stream()], delay=2, policy=policy)
    assert (one.fate, one.released) == ("refused", 0)
