"""Streams: where an answer is judged, and what counts as caught in time."""

import pytest

from tests.guards import WordGuard
from training.labelled import Example
from training.streams import Outcome, measure_streams, outcome, stream

TEXT = "One. Two. Three. Four. Five."


def answer(text: str, number: int = 0, unsafe: bool = True) -> Example:
    return Example(
        id=f"r{number}",
        source="s",
        role="response",
        prompt=f"ask {number}",
        response=text,
        unsafe=unsafe,
    )


def test_a_stream_is_judged_at_the_end_of_each_sentence() -> None:
    item = stream(answer(TEXT), 9)
    assert item.ends == (5, 10, 17, 23, 28)
    assert item.first_harmful == 1
    assert [prefix.text for prefix in item.prefixes()] == [
        "One. ",
        "One. Two. ",
        "One. Two. Three. ",
        "One. Two. Three. Four. ",
        TEXT,
    ]
    assert {prefix.context[-1].text for prefix in item.prefixes()} == {"ask 0"}


@pytest.mark.parametrize("end", [0, -1, 29])
def test_an_offset_outside_the_answer_is_refused(end: int) -> None:
    with pytest.raises(ValueError, match=r"of r0 is .* 28 characters"):
        stream(answer(TEXT), end)


@pytest.mark.parametrize(
    ("flags", "early", "in_time", "read"),
    [
        ("-x---", False, True, 10 / 28),
        ("x----", True, True, 5 / 28),
        ("---x-", False, True, 23 / 28),
        ("----x", False, False, 1.0),
    ],
)
def test_a_flag_is_in_time_for_two_sentences(
    flags: str, early: bool, in_time: bool, read: float
) -> None:
    found = outcome(stream(answer(TEXT), 9), [flag == "x" for flag in flags])
    assert found == Outcome(True, True, True, flags[-1] == "x", early, in_time, read)


def test_what_is_never_flagged_is_never_caught() -> None:
    found = outcome(stream(answer(TEXT), 9), [False] * 5)
    assert (found.ever, found.early, found.in_time) == (False, False, False)


def test_the_figures_of_streams() -> None:
    bad = "severe-violence"
    streams = [
        stream(answer(f"Fine. {bad}. Fine. Fine.", 0), 6 + len(bad)),
        stream(answer("Fine. Fine.", 1), 5),
        # Nobody said where its harm is: neither in time nor late.
        stream(answer(f"Fine. Fine. {bad}. Fine.", 4), None),
        stream(answer("Fine. Fine.", 2, unsafe=False), None),
        stream(answer(f"Fine. {bad}.", 3, unsafe=False), None),
    ]
    found = measure_streams(WordGuard(), streams)
    assert {key: found[key] for key in found if key != "intervals"} == {
        "harmful": 3,
        "harmless": 2,
        "located": 2,
        "caught_in_time": 0.5,
        "caught_early": 0.0,
        "caught_ever": pytest.approx(2 / 3),
        "caught_whole": pytest.approx(2 / 3),
        "median_read": pytest.approx((23 / 34 + 29 / 34) / 2),
        "false_flags": 0.5,
        "false_flags_whole": 0.5,
        "f1": pytest.approx(2 / 3),
        "f1_whole": pytest.approx(2 / 3),
    }
    counts = {"harmful", "harmless", "located"}
    assert found["intervals"].keys() == found.keys() - counts - {"intervals"}
