"""Robustness: the change of the rates, and that every obfuscation is judged."""

import numpy as np
import pytest

from tests.guards import WordGuard
from training.labelled import Example
from training.obfuscation import OBFUSCATIONS
from training.robustness import changes, judgements, measure_robustness


def test_changes_are_against_the_plain_text() -> None:
    truth = np.array([1, 1, 0, 0], bool)
    plain, typos = np.array([1, 1, 0, 1], bool), np.array([1, 0, 0, 0], bool)
    found = changes(truth, {"plain": plain, "typos": typos}, ["a", "b", "c", "d"])
    assert (found["n"], found["unsafe"]) == (4, 2)
    assert (found["plain"]["recall"], found["plain"]["fpr"]) == (1.0, 0.5)
    assert "recall_change" not in found["plain"]
    assert (found["typos"]["recall_change"], found["typos"]["fpr_change"]) == (-0.5, -0.5)
    assert found["typos"]["intervals"]["recall_change"] == pytest.approx((-1.0, 0.0))


def test_each_obfuscation_is_judged_by_a_guard_that_knows_words_by_letter() -> None:
    examples = [
        Example(id="1", source="s", role="prompt", prompt="severe-violence now", unsafe=True),
        Example(id="2", source="s", role="prompt", prompt="the weather", unsafe=False),
    ]
    done: list[int] = []
    found = measure_robustness(WordGuard(), examples, done.append)
    assert found.keys() == {"n", "unsafe", "plain", *OBFUSCATIONS}
    assert found["plain"]["recall"] == 1.0
    # What base64 hides is revealed; a letter that is doubled or dropped is not.
    assert found["base64"]["recall_change"] == 0.0
    assert found["typos"]["recall_change"] == -1.0
    assert sum(done) == judgements(examples)
