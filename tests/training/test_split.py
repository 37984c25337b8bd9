"""A text's side of a split depends on its words alone."""

import pytest

from training.split import normal, position


@pytest.mark.parametrize("other", ["what now", "What, now?!", " what\nnow "])
def test_layout_case_and_punctuation_do_not_move_a_text(other: str) -> None:
    assert position(other) == position("What now?")


def test_texts_spread_evenly() -> None:
    places = [position(f"text {number}") for number in range(2000)]
    assert all(0 <= place < 1 for place in places)
    assert sum(place < 0.5 for place in places) == pytest.approx(1000, abs=80)


def test_a_text_without_words_is_itself() -> None:
    assert normal("?!") == "?!"
