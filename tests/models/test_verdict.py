"""What a verdict says: levels, categories, signals."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.taxonomy import CATEGORIES, SIGNALS, Severity
from models.verdict import Coverage, Verdict, nothing


def verdict(at_least: tuple[float, float, float], **scores: float) -> Verdict:
    """With the scores of the categories and signals that are named."""
    return Verdict(
        "prompt",
        at_least,
        tuple(scores.get(name, 0.0) for name in CATEGORIES),
        tuple(scores.get(name, 0.0) for name in SIGNALS),
        Coverage(1, 1, 1),
    )


@pytest.mark.parametrize(
    ("at_least", "level"),
    [
        ((0.49, 0.4, 0.3), Severity.NONE),
        ((0.5, 0.4, 0.3), Severity.MINOR),
        ((0.9, 0.5, 0.3), Severity.MODERATE),
        ((0.9, 0.8, 0.5), Severity.SEVERE),
    ],
)
def test_the_level_is_the_largest_at_the_operating_point(
    at_least: tuple[float, float, float], level: Severity
) -> None:
    assert verdict(at_least).level is level


def test_severity_score_is_the_mean_of_the_three() -> None:
    assert verdict((0.9, 0.6, 0.3)).severity_score == pytest.approx(0.6)
    assert verdict((0.9, 0.6, 0.3)).unsafe_probability == 0.9


def test_categories_fire_only_where_the_text_is_harmful_the_strongest_first() -> None:
    scores = {"violence": 0.6, "drugs": 0.9, "cybercrime": 0.4}
    assert verdict((0.9, 0.9, 0.1), **scores).categories == ("drugs", "violence")
    assert verdict((0.4, 0.1, 0.0), **scores).categories == ()


def test_a_category_has_the_texts_level_where_it_fires() -> None:
    judged = verdict((0.9, 0.9, 0.1), violence=0.6, drugs=0.4)
    assert judged.category_severity("violence") is Severity.MODERATE
    assert judged.category_severity("drugs") is Severity.NONE
    assert verdict((0.1, 0.0, 0.0), violence=0.6).category_severity("violence") is Severity.NONE


def test_signals_stand_beside_harm() -> None:
    judged = verdict((0.1, 0.0, 0.0), self_harm=0.7, refusal=0.4)
    assert judged.signals == ("self_harm",)


def test_scores_hold_every_name_that_a_mapping_may_use() -> None:
    assert len(nothing("prompt").scores()) == 19 + 4 + 3


@given(st.lists(st.floats(0, 1), min_size=3, max_size=3))
def test_a_higher_level_never_comes_without_the_lower(values: list[float]) -> None:
    low, middle, high = sorted(values)
    judged = verdict((high, middle, low))
    assert (judged.level >= Severity.SEVERE) == (low >= 0.5)
    assert (judged.level >= Severity.MINOR) == (high >= 0.5)
