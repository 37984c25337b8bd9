"""Long texts: how documents are made, and what is told of them."""

import numpy as np
import pytest

from tests.guards import WordGuard
from training.documents import document, judgements, measure_documents, with_inserted

TEXTS = ["the first text.", "the second one. It has two sentences.", "third"]


@pytest.mark.parametrize("length", [1, 10, 100, 2000])
def test_a_document_is_as_long_as_was_asked(length: int) -> None:
    text = document(TEXTS, length, np.random.default_rng(0))
    assert len(text) == length
    assert {paragraph for paragraph in text.split("\n\n")[:-1]} <= set(TEXTS)


def test_documents_are_the_same_each_time_and_differ_from_one_another() -> None:
    first, second = np.random.default_rng(0), np.random.default_rng(0)
    assert document(TEXTS, 90, first) == document(TEXTS, 90, second)
    assert len({document(TEXTS, 90, first) for _ in range(20)}) > 1


def test_the_harmful_text_stands_whole_between_two_sentences() -> None:
    generator = np.random.default_rng(0)
    made = {with_inserted("One. Two.", "BAD", generator) for _ in range(50)}
    assert made == {"BAD\n\nOne. Two.", "One. \n\nBAD\n\nTwo.", "One. Two.\n\nBAD"}


def test_shares_by_length() -> None:
    done: list[int] = []
    harmful = ["severe-violence", "not one that it knows"]
    found = measure_documents(WordGuard(), TEXTS, harmful, [50, 3000], 12, done.append)
    assert found.keys() == {"alone", "50", "3000"}
    alone = found["alone"]["found"]
    assert 0 < alone < 1
    for length in ("50", "3000"):
        assert found[length]["n"] == 12
        assert found[length]["flagged"] == 0.0
        # Wherever it stands, the guard that knows a word finds it.
        assert found[length]["found"] == alone
        assert found[length]["intervals"]["found"][0] < alone
    assert sum(done) == judgements([50, 3000], 12) == 60
